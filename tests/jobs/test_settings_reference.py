"""docs/config.md is what the models say, and says something of every setting."""

from __future__ import annotations

from pathlib import Path

from jobs.settings_reference import reference

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "config.md"


def test_the_document_is_up_to_date() -> None:
    assert DOCUMENT.read_text() == reference(), "run: latents settings > docs/config.md"


def test_every_setting_has_a_meaning() -> None:
    rows = [line for line in reference().splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    assert [row for row in rows if row.endswith("|  |")] == []
