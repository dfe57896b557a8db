"""Without the extras, what a trainer needs works, and the command line says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
BLOCK = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"ray", "av", "decord", "psutil", "PIL", "s3fs", "diffusers"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.split(".")[0])
sys.meta_path.insert(0, Missing())
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCK + code, *arguments], capture_output=True, text=True, cwd=PROJECT, check=False
    )


@pytest.mark.parametrize(
    "module", ["cvvae", "pipeline.formats", "pipeline.reader", "pipeline.verify", "pipeline.status", "jobs.cli"]
)
def test_imports_without_extras(module: str) -> None:
    done = run(f"import {module}")
    assert done.returncode == 0, done.stderr


def test_the_command_line_names_the_extra() -> None:
    done = run("from jobs.cli import main; sys.argv = ['latents', 'encode']; main()")
    assert done.returncode == 1
    assert "pip install 'cvvae-latents[encode]'" in done.stderr


def test_verify_works_and_reports_a_missing_dataset(tmp_path: Path) -> None:
    done = run("from jobs.cli import main; sys.argv = ['latents', 'verify', sys.argv[1]]; main()", str(tmp_path))
    assert done.returncode == 1
    assert "run.json does not exist" in done.stdout.replace("\n", " ")
