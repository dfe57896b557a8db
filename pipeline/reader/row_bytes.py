"""The stored numbers of a piece's rows, on their way into a batch: from a local file, or from what was fetched.

Either way each row is copied once, to where the caller wants it. A row's numbers have a prefix right before them (the
header of an npy or safetensors file, in Parquet the value's length), which is compared: what lies elsewhere than the
index says is found without a checksum.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pipeline.errors import DatasetError, StorageError
from pipeline.local_files import LocalFile

OPEN_FILES = 128
"""Of a process, for one dataset."""
SKIPPED_GAP = 16 << 10
"""Bytes between two rows that are not worth reading ahead on a local disk."""


class RowBytes(Protocol):
    """The mean, or the log variance, of each row of a piece."""

    def copy(self, row: int, out: memoryview) -> None:
        """Fill `out` with a row's bare numbers. DatasetError or StorageError if they are not to be had."""
        ...


@dataclass(frozen=True, slots=True)
class FetchedBytes:
    """Rows in memory: the numbers of row n begin at starts[n] of `data`."""

    data: memoryview
    starts: Sequence[int]
    prefix: bytes
    where: str

    def copy(self, row: int, out: memoryview) -> None:
        start = self.starts[row]
        first, stop = start - len(self.prefix), start + len(out)
        if first < 0 or stop > len(self.data) or self.data[first:start] != self.prefix:
            raise misplaced(self.where, start)
        out[:] = self.data[start:stop]


class FileBytes:
    """Rows in a local file: the numbers of row n begin at starts[n]."""

    __slots__ = ("_file", "_open", "_prefix", "_starts", "_where")

    def __init__(
        self, file: LocalFile, reopen: Callable[[], LocalFile], starts: Sequence[int], prefix: bytes, where: str
    ) -> None:
        self._open, self._starts, self._prefix, self._where = reopen, starts, prefix, where
        # weak: there are more pieces than a process may have open files
        self._file = weakref.ref(file)

    def copy(self, row: int, out: memoryview) -> None:
        start, size = self._starts[row], len(self._prefix)
        prefix = bytearray(size)
        try:
            file = self._file() or self._reopened()
            whole = file.read_into((prefix, out), size + len(out), start - size)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise StorageError(f"{self._where}: cannot read it: {error}") from error
        if not whole:
            raise DatasetError(f"{self._where}: truncated: ends before byte {start + len(out)}")
        if prefix != self._prefix:
            raise misplaced(self._where, start)

    def _reopened(self) -> LocalFile:
        file = self._open()
        self._file = weakref.ref(file)
        return file


def misplaced(where: str, start: int) -> DatasetError:
    return DatasetError(f"{where}: no latent of the shape that its index says begins at byte {start}")


def spans(starts: Sequence[int], length: int) -> list[tuple[int, int]]:
    """(start, stop) of what to read ahead for rows of one length that lie one after the other: all, or each alone."""
    first, stop = starts[0], starts[-1] + length
    if stop - first <= len(starts) * (length + SKIPPED_GAP):
        return [(first, stop)]
    return [(start, start + length) for start in starts]


class OpenFiles:
    """Local shards that are open: those used last. One that is let go stays open while a thread reads it."""

    def __init__(self, open_file: Callable[[int], LocalFile]) -> None:
        self._open, self._files, self._lock = open_file, OrderedDict[int, LocalFile](), threading.Lock()

    def get(self, number: int) -> LocalFile:
        """The shard of this number. FileNotFoundError or StorageError if it cannot be opened."""
        with self._lock:
            file = self._files.get(number)
            if file is None:
                file = self._files[number] = self._open(number)
                if len(self._files) > OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(number)
            return file
