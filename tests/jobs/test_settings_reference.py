"""docs/config.md and docs/finetune-config.md are what the models say, and say something of every setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.settings_reference import finetune_reference, reference

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == reference(), "run: latents settings > docs/config.md"


def test_the_finetune_document_is_up_to_date() -> None:
    document = DOCUMENT.with_name("finetune-config.md")
    assert document.read_text() == finetune_reference(), "run: latents settings finetune > docs/finetune-config.md"


@pytest.mark.parametrize("text", [reference(), finetune_reference()], ids=["encode", "finetune"])
def test_every_setting_has_a_meaning(text: str) -> None:
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if row.endswith("|  |")] == []
