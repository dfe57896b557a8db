"""Keys and captions of rows, made when a piece is loaded: those of a whole index are bytes until then."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.errors import DatasetError


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

    def rows(self, first: int, stop: int) -> list[str]:
        """Of some rows."""
        ends = self.ends[first : stop + 1]
        start = int(ends[0])
        data, parts = bytes(self.data[start : int(ends[-1])]), itertools.pairwise((ends - start).tolist())
        if data.isascii():  # then a text ends where its bytes do
            text = data.decode()
            return [text[begin:end] for begin, end in parts]
        return [data[begin:end].decode() for begin, end in parts]
