"""docs/operations.md says what the code says: messages that it quotes, verbs and settings that it names."""

from __future__ import annotations

import functools
import re

import pytest

from jobs.cli import VERBS
from tests.conftest import PROJECT

TEXT = (PROJECT / "docs" / "operations.md").read_text()
FAILURES = TEXT.split("## What can go wrong\n")[1].split("\n## ")[0]
ROWS = [line.split(" | ") for line in FAILURES.splitlines() if line.startswith("| ") and "|---" not in line]
NOT_OURS = {
    "OUT",
    "repair",
    "retry",
    "status",
    "silent",
    "error",
    "store",
    "$TMPDIR",
    "No space left on device",
    "bad clock",
}
"""Words of the page, the shell and the system."""


@functools.cache
def said_by_the_code() -> str:
    """The sources, with strings that go on in the next line put together and `{...}` of f-strings as dots."""
    files = [path for folder in ("cvvae", "pipeline", "jobs") for path in sorted((PROJECT / folder).rglob("*.py"))]
    text = re.sub(r'"\s*\n\s*f?"', "", "\n".join(path.read_text() for path in files))
    return re.sub(r"\{[^{}\n]*\}|%[sd]|%\.\df", "...", text)


def quoted() -> list[str]:
    """What the tables say that a person sees, cut where a value stands."""
    spans = [span for row in ROWS for cell in row[:2] for span in re.findall(r"`([^`]+)`", cell)]
    pieces = [re.sub(r"^error: \w+:? ?|^OUT/", "", span) for span in spans]
    fragments = [part.strip(" :,.") for piece in pieces for part in re.split(r"\.\.\.|OUT/|OUT| \d+ ", piece)]
    return sorted({part for part in fragments if len(part) > 5} - NOT_OURS)


def test_there_is_something_to_check() -> None:
    assert len(quoted()) > 30


@pytest.mark.parametrize("fragment", quoted())
def test_a_quoted_message_is_the_codes(fragment: str) -> None:
    assert fragment in said_by_the_code()


def test_every_verb_that_is_typed_exists() -> None:
    typed = set(re.findall(r"(?:^|\$ |`)latents ([a-z]+)", TEXT, re.MULTILINE))
    assert typed
    assert typed <= VERBS.keys()
