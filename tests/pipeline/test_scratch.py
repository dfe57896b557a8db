"""Scratch space of killed processes is given back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.scratch import Scratch

HOLDER = """
import sys, time
from pathlib import Path
from pipeline.scratch import Scratch
scratch = Scratch(Path(sys.argv[1]))
(scratch.path / "spool").write_bytes(b"x" * 1000)
print(scratch.path, flush=True)
time.sleep(60)
"""


def test_a_killed_holders_folder_is_removed_and_a_living_ones_is_not(tmp_path: Path) -> None:
    project = Path(__file__).parents[2]
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=project
    )
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    Scratch(tmp_path).close()
    assert (theirs / "spool").exists(), "its holder lives"
    holder.kill()
    holder.wait()
    ours = Scratch(tmp_path)
    assert not theirs.exists()
    assert ours.path.exists()
    ours.close()
    assert list(tmp_path.iterdir()) == []


def test_folders_are_empty_and_go_away(tmp_path: Path) -> None:
    scratch = Scratch(tmp_path)
    with scratch.folder("00012") as folder:
        assert list(folder.iterdir()) == []
        (folder / "spool").touch()
    assert not folder.exists()
    scratch.close()
