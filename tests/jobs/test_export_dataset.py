"""`latents export` as it is typed: what it prints, and its exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from jobs.export_dataset import export
from tests.pipeline.reader.made_datasets import write_dataset


@pytest.fixture
def latents(tmp_path: Path) -> str:
    write_dataset(tmp_path / "latents", shards=2, small=2, long=1, logvar=True)
    return str(tmp_path / "latents")


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(export)
    return CliRunner().invoke(app, list(arguments))


def test_parts_end_with_3_until_all_are_there(latents: str, tmp_path: Path) -> None:
    to = ("--format", "mds", "--to", str(tmp_path / "out"))
    first = run(latents, *to, "--part", "1/2")
    assert (first.exit_code, "other parts are missing" in first.output) == (3, True)
    second = run(latents, *to, "--part", "2/2")
    assert (second.exit_code, "has the whole dataset" in second.output) == (0, True)
    again = run(latents, *to)
    assert again.exit_code == 0
    assert "0 shards, 0 windows, 0 bytes, 2 shards were there" in again.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--format", "fastvideo"), "--without-logvar exports the means alone"),
        (("--format", "mds", "--part", "half"), "expected I/N such as 1/4"),
        (("--format", "csv"), "expected one of ['fastvideo', 'mds']"),
    ],
)
def test_what_cannot_be_is_one_message(latents: str, tmp_path: Path, options: tuple[str, ...], message: str) -> None:
    result = run(latents, *options, "--to", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert message in result.output + result.stderr
    assert "Traceback" not in result.output


def test_without_log_variances(latents: str, tmp_path: Path) -> None:
    result = run(latents, "--format", "fastvideo", "--to", str(tmp_path / "out"), "--without-logvar")
    assert result.exit_code == 0, result.output
