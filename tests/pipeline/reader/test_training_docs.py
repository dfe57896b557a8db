"""The Python blocks of docs/training.md and the README's reader, run on a dataset of latents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.pipeline.reader.made_datasets import write_dataset

PROJECT = Path(__file__).parents[3]
BLOCKS = re.findall(r"```python\n(.*?)```", (PROJECT / "docs" / "training.md").read_text(), re.DOTALL)
README = re.search(r"<!-- reader -->\n```python\n(.*?)```", (PROJECT / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_blocks_run(tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    write_dataset(tmp_path, small=30)
    exec(BLOCKS[number].replace("data/demo/latents", str(tmp_path)), {})
    assert number > 0 or "torch.Size([8, 4, 5, 2, 2]) a caption of" in capsys.readouterr().out


def test_there_are_blocks() -> None:
    assert len(BLOCKS) == 3


def test_the_readme_reads_in_six_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert README is not None
    code = README[1]
    assert len([line for line in code.splitlines() if line]) == 6
    write_dataset(tmp_path, small=30)
    exec(code.replace("data/demo/latents", str(tmp_path)), {})
    assert "torch.Size([8, 4, " in capsys.readouterr().out
