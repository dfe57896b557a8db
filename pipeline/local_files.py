"""Files on a local disk that appear whole or not at all, and leave nothing behind when their writer is killed; and
one that is read in many places without a copy between.

On Linux the content goes into a file without a name (O_TMPFILE), which the kernel forgets with its writer; linking it
to its name is what creates it, and fails if the name is taken. Where that is not to be had (another system, NFS), a
named file in a staging folder takes its place; what a killed writer leaves there is removed once it is old.
"""

from __future__ import annotations

import os
import shutil
import time
import uuid
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

STAGING = ".staging"
ABANDONED_AFTER_SECONDS = 24 * 3600.0
_BLOCK = 8 << 20


class LocalFile:
    """A file open for reading, closed when nobody has it any more. Any number of threads may read.

    Not a memory map: a file that is cut, or a disk that fails, is an OSError here and the end of the process there.
    """

    __slots__ = ("__weakref__", "_descriptor")

    def __init__(self, path: str) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def read_into(self, buffers: Sequence[bytearray | memoryview], size: int, offset: int) -> bool:
        """Fill the buffers, `size` bytes in all, in turn from `offset` on; False if the file ends before."""
        done = os.preadv(self._descriptor, buffers, offset)
        while done < size:  # the end of the file, or a read that stopped early, as large ones may
            rest = _after(buffers, done)
            more = os.preadv(self._descriptor, rest, offset + done)
            if more == 0:
                return False
            done += more
        return True

    def will_need(self, start: int, stop: int) -> None:
        """Let the system read the bytes [start, stop) ahead in large reads, where it can."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def _after(buffers: Sequence[bytearray | memoryview], done: int) -> list[memoryview]:
    """What of the buffers is left behind the first `done` bytes."""
    rest = []
    for buffer in buffers:
        view = memoryview(buffer)[done:]
        done = max(0, done - len(buffer))
        if len(view):
            rest.append(view)
    return rest


def create_file(target: Path, content: bytes | Path, staging: Path) -> bool:
    """Create `target` with this content only if it is absent; False if it is there. Synced to disk.

    `staging` is a folder on the same file system, made only if it is needed.
    """
    if target.exists():
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    created = _create_anonymous(target, content)
    if created is None:
        created = _create_staged(target, content, staging)
    if created:
        _sync_folder(target.parent)
    return created


def replace_file(target: Path, content: bytes, staging: Path) -> None:
    """Write `target` whether or not it is there; readers see the old or the new content whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = _stage(content, staging)
    staged.replace(target)
    _sync_folder(target.parent)
    _leave(staging)


def _create_anonymous(target: Path, content: bytes | Path) -> bool | None:
    """None where the system or the file system has no files without a name."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        descriptor = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o644)
    except OSError:
        return None
    with open(descriptor, "wb") as out:
        _fill(out, content)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            # a directory descriptor makes Python call linkat, which can follow the link in /proc to the file
            os.link(f"/proc/self/fd/{descriptor}", target, src_dir_fd=folder, follow_symlinks=True)
        except FileExistsError:
            return False
        except FileNotFoundError:
            return None  # no /proc
        finally:
            os.close(folder)
    return True


def _create_staged(target: Path, content: bytes | Path, staging: Path) -> bool:
    staged = _stage(content, staging)
    try:
        os.link(staged, target)
    except FileExistsError:
        return False
    finally:
        staged.unlink()
        _leave(staging)
    return True


def _stage(content: bytes | Path, staging: Path) -> Path:
    """A complete, synced copy under a name nobody reads."""
    staged = staging / uuid.uuid4().hex
    out = _open_new(staged)
    try:
        with out:
            _fill(out, content)
    except BaseException:  # Ctrl-C too: what was staged is nobody's
        staged.unlink(missing_ok=True)
        raise
    return staged


def _open_new(path: Path) -> BinaryIO:
    """Another writer may remove the empty folder between our making it and our using it."""
    for _ in range(100):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("xb")
        except (FileNotFoundError, FileExistsError):  # the folder went between two steps, of mkdir's own even
            continue
    raise FileNotFoundError(path)


def _fill(out: BinaryIO, content: bytes | Path) -> None:
    if isinstance(content, Path):
        with content.open("rb") as source:
            shutil.copyfileobj(source, out, _BLOCK)
    else:
        out.write(content)
    out.flush()
    os.fsync(out.fileno())


def _leave(staging: Path) -> None:
    """Remove abandoned files, and the folder if it is empty: another writer may be using it."""
    oldest = time.time() - ABANDONED_AFTER_SECONDS
    try:
        for path in staging.iterdir():
            if path.stat().st_mtime < oldest:
                path.unlink()
        staging.rmdir()
    except OSError:
        return  # not empty, or another writer was quicker


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
