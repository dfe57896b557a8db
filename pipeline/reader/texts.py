"""Keys and captions of rows, without a Python object for each before it is wanted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import DatasetError


class Texts:
    """A text of each row of a piece, made when it is asked for: most of a piece waits for later batches."""

    __slots__ = ("_data", "_ends")

    def __init__(self, data: bytes, ends: Sequence[int]) -> None:
        """`data` is UTF-8; row n is from ends[n] to ends[n + 1]."""
        self._data, self._ends = data, ends

    def __getitem__(self, row: int) -> str:
        return self._data[self._ends[row] : self._ends[row + 1]].decode()


@dataclass(frozen=True, slots=True)
class TextColumn:
    """A text of each row of a shard, as Arrow has them: UTF-8, and int32 (rows + 1,) where each begins and ends."""

    data: memoryview
    ends: np.ndarray

    @classmethod
    def of(cls, column: pa.ChunkedArray, where: str) -> TextColumn:
        """DatasetError where a row has none."""
        if column.null_count:
            raise DatasetError(f"{where}: rows without a text that every row has")
        array = column.combine_chunks()
        _, ends, data = array.buffers()
        numbers = np.frombuffer(ends, np.int32)[array.offset : array.offset + len(array) + 1]
        return cls(memoryview(data if data is not None else b""), numbers)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.ends.nbytes

    def rows(self, first: int, stop: int) -> Texts:
        """Of some rows: a copy, which does not keep the whole column in memory."""
        ends = self.ends[first : stop + 1]
        start = int(ends[0])
        return Texts(bytes(self.data[start : int(ends[-1])]), (ends - start).tolist())
