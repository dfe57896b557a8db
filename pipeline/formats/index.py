"""The index of a shard: one row per window with everything but its numbers, and where the numbers are.

A Parquet file beside the shard, small enough to plan an epoch from: the columns of a Parquet shard without its
payload, the row's number, and a PayloadPlace. Its metadata carries the shard's header, sha256 and size.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import DatasetError
from pipeline.formats.arrow_columns import (
    ROW_COLUMNS,
    header_of,
    metadata_value,
    open_parquet,
    require_columns,
    rows_of,
)
from pipeline.formats.contract import IndexRow, PayloadPlace
from pipeline.formats.fields import fields_of, row_from
from pipeline.formats.header import HEADER_KEY, ShardHeader, canonical_line, name_of
from pipeline.records import LatentRow

SHARD_KEY = "CVVAE.shard"
"""Key-value metadata of an index: size and sha256 of the shard it describes."""
ROW_GROUP_ROWS = 4096

_PLACE_NAMES = tuple(field.name for field in dataclasses.fields(PayloadPlace))
INDEX_SCHEMA = pa.schema(
    [*ROW_COLUMNS, pa.field("row_number", pa.int64()), *(pa.field(name, pa.int64()) for name in _PLACE_NAMES)]
)


class _ShardFile(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    size: int = Field(ge=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexInfo:
    """What an index says of its shard as a whole."""

    header: ShardHeader
    shard_sha256: str
    shard_size: int
    """Bytes."""
    num_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardIndex(IndexInfo):
    """A whole index in memory."""

    rows: list[IndexRow]


def write_index(
    path: Path,
    rows: Sequence[LatentRow],
    places: Sequence[PayloadPlace],
    *,
    header: ShardHeader,
    shard_sha256: str,
    shard_size: int,
) -> None:
    """Write the index of a shard whose `write` gave these places for these rows."""
    if len(rows) != len(places):
        raise ValueError(f"expected a place for each of {len(rows)} rows, got {len(places)}")
    shard = _ShardFile(sha256=shard_sha256, size=shard_size)
    metadata = {HEADER_KEY: header.to_json(), SHARD_KEY: canonical_line(shard.model_dump())}
    with pq.ParquetWriter(
        path, INDEX_SCHEMA.with_metadata(metadata), compression="zstd", write_page_checksum=True
    ) as writer:
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            numbers = range(start, min(start + ROW_GROUP_ROWS, len(rows)))
            columns = [_columns(rows[number], number, places[number]) for number in numbers]
            writer.write_table(pa.Table.from_pylist(columns, schema=INDEX_SCHEMA))


def _columns(row: LatentRow, number: int, place: PayloadPlace) -> dict[str, Any]:
    return {**fields_of(row), "row_number": number, **{name: getattr(place, name) for name in _PLACE_NAMES}}


def read_index(file: Path | BinaryIO) -> ShardIndex:
    """All of an index. DatasetError if it is damaged or not one of ours; FileNotFoundError for a missing path."""
    where = name_of(file)
    with open_parquet(file) as parquet:
        info = _info(parquet, where)
        rows = list(_rows(parquet, where))
    return ShardIndex(
        header=info.header,
        shard_sha256=info.shard_sha256,
        shard_size=info.shard_size,
        num_rows=info.num_rows,
        rows=rows,
    )


def read_index_info(file: Path | BinaryIO) -> IndexInfo:
    """The index's metadata alone: one read of the file's footer."""
    with open_parquet(file) as parquet:
        return _info(parquet, name_of(file))


def iter_index(file: Path | BinaryIO, batch_rows: int = 1024) -> Iterator[IndexRow]:
    """The rows of an index in stored order, `batch_rows` in memory at a time."""
    with open_parquet(file) as parquet:
        _info(parquet, name_of(file))
        yield from _rows(parquet, name_of(file), batch_rows)


def read_index_columns(file: Path | BinaryIO, columns: Sequence[str]) -> tuple[IndexInfo, pa.Table]:
    """Some columns of a whole index, as Arrow has them: quick, and checked no further than their types.

    ValueError for a column that no index has; DatasetError if the index is damaged or not one of ours.
    """
    unknown = sorted(set(columns) - set(INDEX_SCHEMA.names))
    if unknown:
        raise ValueError(f"columns: expected some of {INDEX_SCHEMA.names}, got {unknown}")
    with open_parquet(file) as parquet:
        info = _info(parquet, name_of(file))
        return info, parquet.read(columns=list(columns), use_threads=False).combine_chunks()


def _info(parquet: pq.ParquetFile, where: str) -> IndexInfo:
    header = header_of(parquet, where)
    require_columns(parquet, INDEX_SCHEMA, where)
    try:
        shard = _ShardFile.model_validate(json.loads(metadata_value(parquet, SHARD_KEY, where)))
    except (ValidationError, ValueError) as error:
        raise DatasetError(f"{where}: {SHARD_KEY}: {error}") from error
    return IndexInfo(
        header=header,
        shard_sha256=shard.sha256,
        shard_size=shard.size,
        num_rows=parquet.metadata.num_rows,
    )


def _rows(parquet: pq.ParquetFile, where: str, batch_rows: int = 1024) -> Iterator[IndexRow]:
    number = 0
    for group in range(parquet.num_row_groups):
        for columns in rows_of(parquet, INDEX_SCHEMA.names, group, batch_rows):
            place = f"{where}: row {number}"
            if columns["row_number"] != number:
                raise DatasetError(f"{place}: row_number: expected {number}, got {columns['row_number']}")
            yield IndexRow(
                row=row_from(columns, place),
                row_number=number,
                **{name: _whole(columns[name], name, place) for name in _PLACE_NAMES},
            )
            number += 1


def _whole(value: int | None, name: str, where: str) -> int | None:
    if value is not None and value < 0:
        raise DatasetError(f"{where}: {name}: expected null or at least 0, got {value}")
    return value
