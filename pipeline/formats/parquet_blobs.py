"""Where the values of a payload column are in a Parquet shard, so that one can be read without its row group.

The payload columns are plain: not compressed, no dictionary. A column chunk is then a row of pages, each a header in
Thrift's compact form, the definition levels, and the values, every one its length in four bytes and its bytes. So the
footer and one small read per page give the place of every value. The layouts are those of the Parquet format's
documents (parquet.thrift, Encodings.md) and of Thrift's compact protocol.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.errors import DatasetError
from pipeline.formats.arrow_columns import damage_named

ReadRange = Callable[[int, int], bytes]
"""(start, stop) -> the bytes of the file in [start, stop), fewer at its end."""
_FOOTER_READ = 256 << 10
_HEADER_READ = 4096
"""Enough for a page header and the definition levels of a page without nulls."""
_LENGTH = 4
_DATA_PAGE, _PLAIN = 0, 0


def blob_offsets(read: ReadRange, size: int, column: str, lengths: Sequence[int], where: str) -> np.ndarray:
    """int64 (rows,): where the bytes of each row's value begin in a file of `size` bytes.

    `lengths` are the values' bytes, which the index tells. DatasetError if the file has other ones, nulls, or pages
    that are compressed: then it is not one of ours or damaged.
    """
    with damage_named(where):
        metadata = pq.read_metadata(io.BytesIO(_footer(read, size, where)))
    if metadata.num_rows != len(lengths):
        raise DatasetError(f"{where}: expected {len(lengths)} rows, got {metadata.num_rows}")
    offsets = np.empty(len(lengths), np.int64)
    row = 0
    for group in range(metadata.num_row_groups):
        chunk = _chunk(metadata.row_group(group), column, where)
        position, end = chunk.data_page_offset, chunk.data_page_offset + chunk.total_compressed_size
        stop = row + metadata.row_group(group).num_rows
        while row < stop:
            page = _page(read(position, min(end, position + _HEADER_READ)), f"{where}: {column} at byte {position}")
            values = np.asarray(lengths[row : row + page.num_values], np.int64) + _LENGTH
            first = position + page.values_start
            if row + page.num_values > stop or values.sum() != page.size - (page.values_start - page.header_length):
                raise DatasetError(f"{where}: {column}: a page at byte {position} has not the values its index says")
            offsets[row : row + page.num_values] = first + np.cumsum(values) - values + _LENGTH
            row += page.num_values
            position += page.header_length + page.size
    return offsets


def _footer(read: ReadRange, size: int, where: str) -> bytes:
    """The end of the file, with all of its footer."""
    tail = read(max(0, size - _FOOTER_READ), size)
    if len(tail) < 12 or tail[-4:] != b"PAR1":
        raise DatasetError(f"{where}: not a whole Parquet file of {size} bytes")
    needed = int.from_bytes(tail[-8:-4], "little") + 8
    return tail if needed <= len(tail) or needed > size else read(size - needed, size)


def _chunk(group: Any, column: str, where: str) -> Any:
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema == column:
            if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page:
                raise DatasetError(f"{where}: {column}: expected plain values, got {chunk.compression}")
            return chunk
    raise DatasetError(f"{where}: column {column} is missing")


@dataclass(frozen=True, slots=True)
class _Page:
    header_length: int
    size: int
    """Bytes after the header."""
    num_values: int
    values_start: int
    """Bytes from the page's start to its first value."""


def _page(data: bytes, where: str) -> _Page:
    try:
        fields, length = _Compact(data).struct()
        details = fields[5]
        num_values, size = details[1], fields[2]
        if (fields[1], details[2]) != (_DATA_PAGE, _PLAIN) or fields[3] != size or num_values < 1:
            raise DatasetError(f"{where}: expected a plain data page, got type {fields[1]}, encoding {details[2]}")
        levels = int.from_bytes(data[length : length + 4], "little")
        _require_no_nulls(data[length + 4 : length + 4 + levels], num_values, where)
    except (KeyError, IndexError, TypeError) as error:
        raise DatasetError(f"{where}: no page header of Parquet") from error
    return _Page(header_length=length, size=size, num_values=num_values, values_start=length + 4 + levels)


def _require_no_nulls(levels: bytes, num_values: int, where: str) -> None:
    """The definition levels must be one run of ones."""
    run, at = _Compact(levels).varint(), len(levels) - 1
    if run != num_values << 1 or levels[at] != 1:
        raise DatasetError(f"{where}: expected a value in every row")


class _Compact:
    """Just enough of Thrift's compact protocol for page headers. IndexError where the bytes end."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._data[self._at]
            self._at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise IndexError("a varint without an end")

    def integer(self) -> int:
        value = self.varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self) -> tuple[dict[int, Any], int]:
        """Fields by number, and the position after it."""
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._data[self._at]:
            self._at += 1
            number = number + (kind >> 4) if kind >> 4 else self.integer()
            fields[number] = self._value(kind & 0x0F)
        self._at += 1
        return fields, self._at

    def _value(self, kind: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind in (4, 5, 6):
            return self.integer()
        if kind == 8:
            length = self.varint()
            self._at += length
            return self._data[self._at - length : self._at]
        if kind == 12:
            return self.struct()[0]
        raise TypeError(f"a Thrift type that page headers do not have: {kind}")
