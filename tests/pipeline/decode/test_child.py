"""The child process: what it needs to start, what it imports, and that it never outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from pipeline.decode.pool import ClipDone, DecodePool
from pipeline.errors import ConfigError, PipelineError
from pipeline.policies import DecodePolicy, ResizePolicy, WindowPolicy
from tests.awkward_clips import clips

PROJECT = Path(__file__).resolve().parents[3]


def test_a_child_that_cannot_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "PIL.py").write_text("raise ImportError('this Pillow is broken')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(PipelineError, match=r"(?s)does not start: exit code 1: .*this Pillow is broken"):
        DecodePool(DecodePolicy(), 2)


def test_without_decord_pyav_reads_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, real_clips: dict[str, Path]
) -> None:
    (tmp_path / "decord.py").write_text("raise ModuleNotFoundError('No module named decord')")
    monkeypatch.syspath_prepend(tmp_path)
    with DecodePool(DecodePolicy(), 1) as pool:
        assert [name.split("-")[0] for name in pool.decoders] == ["pyav"]
        assert "backend=decord" in caplog.text
        *_, end = pool.decode(
            clips([real_clips["carphone_distorted.mp4"]]), WindowPolicy(), ResizePolicy(), (1, 5, 9, 13, 17)
        )
        assert isinstance(end, ClipDone)
        assert end.summary is not None
    with pytest.raises(ConfigError, match="none of the decode backends decord"):
        DecodePool(DecodePolicy(backends=("decord",)), 1)


def test_the_child_imports_neither_torch_nor_ray() -> None:
    program = "import sys, pipeline.decode.child; print([m for m in ('torch', 'ray', 'pyarrow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


_PARENT = """
import sys, time
from pathlib import Path
from pipeline.decode.pool import DecodePool, WindowReady
from pipeline.decode.blob import Blob
from pipeline.policies import DecodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Clip

def clips():
    data = Path(sys.argv[1]).read_bytes()
    while True:
        yield Clip(key="k", shard_id="s", video=Blob.from_bytes(data), video_sha256="", file_name="f", caption="",
                   metadata={})

pool = DecodePool(DecodePolicy(), 2)
events = pool.decode(clips(), WindowPolicy(), ResizePolicy(), (1, 5, 9, 13, 17))
next(events)
print(*pool.child_pids(), flush=True)
for _ in events:
    pass
"""


def test_children_die_with_a_killed_parent(real_clips: dict[str, Path], tmp_path: Path) -> None:
    """Started from another folder: the child finds the packages by its parent's import path, not by its own."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    parent = subprocess.Popen(
        [sys.executable, "-c", _PARENT, str(real_clips["bikes.mp4"])],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(psutil.pid_exists(pid) for pid in pids)
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 5
    while any(_runs(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in pids)


def _runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
