"""Files that appear whole or not at all, with and without the kernel's help."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from pipeline import local_files
from pipeline.local_files import LocalFile, create_file, replace_file


@pytest.fixture(params=["anonymous", "staged"])
def staging(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Both ways; the second is what other systems and NFS have."""
    if request.param == "staged":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    elif not hasattr(os, "O_TMPFILE"):
        pytest.skip("no O_TMPFILE on this system")
    return tmp_path / "out" / ".staging"


def files_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_the_first_writer_wins_and_nothing_else_is_left(staging: Path) -> None:
    target = staging.parent / "shards" / "00000.tar"
    contents = [bytes([number]) * 100_000 for number in range(12)]
    won: list[int] = []
    start = threading.Barrier(len(contents))

    def write(number: int) -> None:
        start.wait()
        if create_file(target, contents[number], staging):
            won.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(len(contents))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert target.read_bytes() == contents[won[0]]
    assert files_below(staging.parent) == ["shards", "shards/00000.tar"]
    assert target.stat().st_mode & 0o444 == 0o444


def test_replace_from_many_threads_leaves_one_whole_content(staging: Path) -> None:
    target = staging.parent / "manifest.json"
    contents = [bytes([number]) * 50_000 for number in range(16)]
    threads = [threading.Thread(target=replace_file, args=(target, content, staging)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() in contents
    assert files_below(staging.parent) == ["manifest.json"]


def test_a_failed_copy_leaves_nothing(staging: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        create_file(staging.parent / "a.tar", tmp_path / "missing", staging)
    assert [name for name in files_below(staging.parent) if name != ".staging"] == []


def test_old_debris_goes_and_another_writers_file_stays(staging: Path) -> None:
    staging.mkdir(parents=True)
    old, new = staging / "old", staging / "new"
    old.touch()
    new.touch()
    os.utime(old, (0, 0))
    replace_file(staging.parent / "a.json", b"{}", staging)
    assert files_below(staging) == ["new"]
    assert local_files.ABANDONED_AFTER_SECONDS > 3600


def test_a_read_fills_its_buffers_in_turn_or_says_that_the_file_ends(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    first, second = bytearray(3), bytearray(5)
    assert LocalFile(str(path)).read_into((first, second), 8, 90)
    assert (bytes(first), bytes(second)) == (bytes(range(90, 93)), bytes(range(93, 98)))
    assert not LocalFile(str(path)).read_into((first, second), 8, 93)
    LocalFile(str(path)).will_need(0, 1 << 40)


def test_a_read_that_stops_early_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    preadv = os.preadv

    def two_bytes(descriptor: int, buffers: list[bytearray], offset: int) -> int:
        return preadv(descriptor, [memoryview(buffers[0])[:2]], offset)

    monkeypatch.setattr(os, "preadv", two_bytes)
    first, second = bytearray(3), bytearray(6)
    assert LocalFile(str(path)).read_into((first, second), 9, 10)
    assert first + second == bytes(range(10, 19))


def test_a_file_is_closed_when_nobody_has_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    file = LocalFile(str(path))
    descriptor = file._descriptor
    del file
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
