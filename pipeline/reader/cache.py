"""A bounded folder of ranges of objects, shared by all processes of a machine.

Objects are kept in chunks of one size, each a file that appears whole or not at all under a name that says whose
content it is. Two processes may fetch one chunk at the same time; both give the same file. Whoever has written a
64th of the bound looks through the folder under a lock and removes the files used longest ago, down to 80 % of it, so
up to twelve processes stay within the bound. A file that is removed while it is read is read to its end.
"""

from __future__ import annotations

import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

CHUNK_BYTES = 4 << 20
_KEEP = 0.8
_SCAN_PART = 64
_ABANDONED_AFTER_SECONDS = 3600.0

Fetch = Callable[[int, int], bytes]
"""(start, stop) -> the bytes of the object in [start, stop)."""


class RangeCache:
    """Chunks of objects in a local folder. ValueError for a bound that does not hold 64 chunks."""

    def __init__(self, folder: Path, max_bytes: int, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        if max_bytes < _SCAN_PART * chunk_bytes:
            raise ValueError(f"cache_bytes: expected at least {_SCAN_PART * chunk_bytes}, got {max_bytes}")
        self.folder, self.max_bytes, self.chunk_bytes = folder, max_bytes, chunk_bytes
        self._written = max_bytes  # look through what an earlier process left before adding to it
        self._lock = threading.Lock()

    def read(self, content: str, size: int, start: int, stop: int, fetch: Fetch) -> bytes:
        """The bytes [start, stop) of an object of `size` bytes; what is missing is fetched in as few reads as can be.

        `content` names the object's content, not its place: letters and digits, such as its sha256.
        """
        stop = min(stop, size)
        if start >= stop:
            return b""
        numbers = range(start // self.chunk_bytes, -(-stop // self.chunk_bytes))
        chunks = {number: self._kept(content, number, size) for number in numbers}
        for first, last in _spans([number for number in numbers if chunks[number] is None]):
            begin = first * self.chunk_bytes
            data = fetch(begin, min(size, (last + 1) * self.chunk_bytes))
            for number in range(first, last + 1):
                offset = number * self.chunk_bytes - begin
                chunks[number] = data[offset : offset + self.chunk_bytes]
                if len(chunks[number] or b"") == self._length(number, size):  # a short one is for the reader to judge
                    self._keep(content, number, chunks[number] or b"")
        joined = b"".join(chunk or b"" for chunk in chunks.values())
        offset = start - numbers.start * self.chunk_bytes
        return joined[offset : offset + stop - start]

    def _length(self, number: int, size: int) -> int:
        return min(self.chunk_bytes, size - number * self.chunk_bytes)

    def _path(self, content: str, number: int) -> Path:
        return self.folder / content[:2] / f"{content}.{self.chunk_bytes}.{number}"

    def _kept(self, content: str, number: int, size: int) -> bytes | None:
        path = self._path(content, number)
        try:
            data = path.read_bytes()
            os.utime(path)  # how eviction knows what was used last
        except FileNotFoundError:
            return None
        return data if len(data) == self._length(number, size) else None

    def _keep(self, content: str, number: int, data: bytes) -> None:
        with self._lock:
            self._written += len(data)
            due = self._written > self.max_bytes // _SCAN_PART
            if due:
                self._written = 0
        if due:
            self._evict()
        path = self._path(content, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            staged.write_bytes(data)
            staged.replace(path)
        finally:
            staged.unlink(missing_ok=True)

    def _evict(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / "evict.lock"):  # waited for: who went on writing meanwhile would pass the bound
            self._remove_oldest()

    def _remove_oldest(self) -> None:
        found, total = [], 0
        for path in self.folder.glob("*/*"):
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            if path.suffix == ".part" and time.time() - status.st_mtime > _ABANDONED_AFTER_SECONDS:
                path.unlink(missing_ok=True)  # of a killed process
                continue
            total += status.st_size
            if path.suffix != ".part":
                found.append((status.st_mtime, status.st_size, path))
        for _, size, path in sorted(found, key=lambda one: one[0]):
            if total <= _KEEP * self.max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def _spans(numbers: list[int]) -> list[tuple[int, int]]:
    """Runs of consecutive numbers, as (first, last)."""
    spans: list[tuple[int, int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1] = (spans[-1][0], number)
        else:
            spans.append((number, number))
    return spans
