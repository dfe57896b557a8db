"""Outputs and scratch space that cannot be written: one clear line, and the promised bytes once they can be."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.fire.harness import Fire, dataset_bytes, require_refusal

pytestmark = pytest.mark.timeout(900)


class Disk:
    """A small file system in memory, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def remount(self, options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", self.folder], check=True, capture_output=True)


@pytest.fixture
def mounted() -> Iterator[Callable[[Path, str], Disk]]:
    """mount(folder, options): skipped where this user may not mount."""
    with ExitStack() as leaving:

        def mount(folder: Path, options: str) -> Disk:
            folder.mkdir(parents=True, exist_ok=True)
            done = subprocess.run(
                ["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f"cannot mount a file system here: {done.stderr.strip()}")
            leaving.callback(subprocess.run, ["umount", "-l", folder], check=False, capture_output=True)
            return Disk(folder)

        yield mount


def size_of(files: dict[str, bytes], prefix: str) -> int:
    return sum(-(-len(content) // 4096) * 4096 for name, content in files.items() if name.startswith(prefix))


def test_an_output_that_cannot_be_written(fire: Fire, tmp_path: Path, mounted: Callable[[Path, str], Disk]) -> None:
    """Read-only, with room for about half of it, read-only again, with room enough: stopped thrice, then finished."""
    output = tmp_path / "out"
    disk = mounted(output, "size=1m,ro")
    with fire.run(tmp_path) as run:
        require_refusal(run, "StorageError", f"cannot write {output}/run.json", "Read-only file system")
    assert dataset_bytes(output) == {}
    half = size_of(fire.reference, "shards/") // 2 + 3 * 4096
    disk.remount(f"rw,size={half}")
    with fire.run(tmp_path) as run:
        require_refusal(run, f"cannot write {output}/", "No space left on device")  # the actor's or the driver's
    kept = dataset_bytes(output)
    assert "manifest.json" not in kept
    assert all(fire.reference[name] == content for name, content in kept.items()), "what is there is whole"
    disk.remount("ro")
    with fire.run(tmp_path) as run:
        require_refusal(run, f"cannot write {output}/", "Read-only file system")
    disk.remount("rw,size=64m")
    with fire.run(tmp_path) as run:
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


@pytest.mark.slow
def test_a_full_scratch_folder_is_named(fire: Fire, tmp_path: Path, mounted: Callable[[Path, str], Disk]) -> None:
    """Nothing of the shard is stored; with room again the same command finishes."""
    disks = [mounted(node.scratch, "size=24k") for node in fire.cluster.nodes]
    with fire.run(tmp_path) as run:
        require_refusal(
            run, "ShardError", f"{fire.cluster.nodes[0].scratch.name}", "No space left on device", "TMPDIR"
        )
    fire.cluster.wait_until_idle()
    assert dataset_bytes(tmp_path / "out").keys() == {"run.json"}
    for disk in disks:
        disk.remount("size=64m")
    with fire.run(tmp_path) as run:
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)
