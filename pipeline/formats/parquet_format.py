"""A shard as a Parquet file: FastVideo's column names as a superset, payload last.

A row group holds one bucket and at most ROW_GROUP_BYTES, so that a reader's batches of one shape are whole reads.
Payload columns are stored as they are: latents do not compress, and statistics over blobs only bloat the footer.
The bytes are a function of the latents, the header and the pyarrow release (named in the file's created_by).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError
from pipeline.formats.arrow_columns import (
    ROW_COLUMNS,
    header_of,
    leaf_path,
    open_parquet,
    require_columns,
    rows_of,
)
from pipeline.formats.contract import IndexRow, PayloadPlace, accepted, tensor_problem, verified
from pipeline.formats.fields import fields_of, row_from
from pipeline.formats.header import HEADER_KEY, ShardHeader, name_of
from pipeline.formats.tensors import dtype_name, raw_bytes, tensor_from_raw
from pipeline.records import Latent, LatentRow

ROW_GROUP_BYTES = 64 << 20
"""Of payload and text; a row group's file size stays well under 100 MB unless one window alone is larger."""
_BATCH_ROWS = 16

_PAYLOAD_COLUMNS: list[pa.Field] = [
    pa.field("vae_logvar_dtype", pa.string()),
    pa.field("vae_logvar_shape", pa.list_(pa.int64())),
    pa.field("vae_latent_bytes", pa.binary()),
    pa.field("vae_logvar_bytes", pa.binary()),
]
_BLOBS = [field.name for field in _PAYLOAD_COLUMNS if pa.types.is_binary(field.type)]
SHARD_SCHEMA = pa.schema(ROW_COLUMNS + _PAYLOAD_COLUMNS)
"""One schema whether log variances are stored or not: their columns are null then."""


@dataclass(frozen=True, slots=True)
class ParquetFormat:
    """FORMATS["parquet"]."""

    name: str = "parquet"
    suffix: str = ".parquet"
    padded_to: int = 1

    def write(self, path: Path, latents: Iterable[Latent], header: ShardHeader) -> list[PayloadPlace]:
        places: list[PayloadPlace] = []
        with _writer(path, header) as writer:
            for number, rows in enumerate(_row_groups(accepted(latents, header))):
                writer.write_table(pa.Table.from_pylist(rows, schema=SHARD_SCHEMA), row_group_size=len(rows))
                places += [PayloadPlace(row_group=number, row_in_group=row) for row in range(len(rows))]
        return places

    def read_header(self, file: BinaryIO) -> ShardHeader:
        with open_parquet(file) as parquet:
            return header_of(parquet, name_of(file))

    def read(self, file: BinaryIO) -> Iterator[Latent]:
        where = name_of(file)
        with open_parquet(file) as parquet:
            header = header_of(parquet, where)
            require_columns(parquet, SHARD_SCHEMA, where)
            yield from verified(_latents(parquet, where), header, where)

    def fetch(self, file: BinaryIO, rows: Sequence[IndexRow]) -> Iterator[Latent]:
        with open_parquet(file) as parquet:
            require_columns(parquet, SHARD_SCHEMA, name_of(file))
            group, table = -1, SHARD_SCHEMA.empty_table()
            for row in rows:
                where = f"{name_of(file)}: {row.row.key}"
                if row.row_group is None or row.row_in_group is None:
                    raise DatasetError(f"{where}: its index row has no row group")
                if row.row_group != group:
                    group, table = row.row_group, _payload_of(parquet, row.row_group, where)
                yield _fetched(table, row.row_in_group, row.row, where)


def _writer(path: Path, header: ShardHeader) -> pq.ParquetWriter:
    leaves = [leaf_path(field) for field in SHARD_SCHEMA]
    text = [leaf for leaf in leaves if leaf not in _BLOBS]
    options: dict[str, Any] = {  # pyarrow annotates only the form of these that goes for all columns
        "compression": {leaf: "none" if leaf in _BLOBS else "zstd" for leaf in leaves},
        "use_dictionary": text,
        "write_statistics": text,
    }
    schema = SHARD_SCHEMA.with_metadata({HEADER_KEY: header.to_json()})
    return pq.ParquetWriter(path, schema, write_page_checksum=True, **options)


def _row_groups(latents: Iterable[Latent]) -> Iterator[list[dict[str, Any]]]:
    """Rows of one bucket, at most ROW_GROUP_BYTES of them (or a single row)."""
    rows: list[dict[str, Any]] = []
    size, bucket = 0, ""
    for latent in latents:
        row = _columns(latent)
        row_size = sum(len(value) for value in row.values() if isinstance(value, str | bytes))
        if rows and (latent.row.bucket != bucket or size + row_size > ROW_GROUP_BYTES):
            yield rows
            rows, size = [], 0
        rows.append(row)
        size, bucket = size + row_size, latent.row.bucket
    if rows:
        yield rows


def _columns(latent: Latent) -> dict[str, Any]:
    columns = fields_of(latent.row)
    columns["vae_latent_bytes"] = raw_bytes(latent.mean_CTHW)
    if latent.logvar_CTHW is not None:
        columns["vae_logvar_dtype"] = dtype_name(latent.logvar_CTHW.dtype)
        columns["vae_logvar_shape"] = columns["vae_latent_shape"]
        columns["vae_logvar_bytes"] = raw_bytes(latent.logvar_CTHW)
    return columns


def _latents(parquet: pq.ParquetFile, where: str) -> Iterator[Latent]:
    for group in range(parquet.num_row_groups):
        bucket: str | None = None
        for number, columns in enumerate(rows_of(parquet, SHARD_SCHEMA.names, group, _BATCH_ROWS)):
            place = f"{where}: row {number} of row group {group}"
            row = row_from(columns, place)
            if bucket not in (None, row.bucket):
                raise DatasetError(f"{place}: expected bucket {bucket}, got {row.bucket}: a row group holds one")
            bucket = row.bucket
            yield _latent(row, columns, f"{where}: {row.key}")


def _latent(row: LatentRow, columns: dict[str, Any], where: str) -> Latent:
    data, logvar = columns["vae_latent_bytes"], columns["vae_logvar_bytes"]
    if data is None:
        raise DatasetError(f"{where}: vae_latent_bytes is null")
    dtype, shape = columns["vae_logvar_dtype"], columns["vae_logvar_shape"]
    if row.has_logvar and (dtype not in (row.latent_dtype, "int8") or shape != list(row.latent_shape)):
        raise DatasetError(
            f"{where}: logvar: expected {row.latent_dtype} or int8 {list(row.latent_shape)}, got {dtype} {shape}"
        )
    return Latent(
        row=row,
        mean_CTHW=tensor_from_raw(data, row.latent_dtype, row.latent_shape, f"{where}: vae_latent_bytes"),
        logvar_CTHW=None
        if logvar is None
        else tensor_from_raw(logvar, dtype or row.latent_dtype, row.latent_shape, f"{where}: vae_logvar_bytes"),
    )


def _payload_of(parquet: pq.ParquetFile, row_group: int, where: str) -> pa.Table:
    if row_group >= parquet.num_row_groups:
        raise DatasetError(f"{where}: expected row group {row_group}, the file has {parquet.num_row_groups}")
    return parquet.read_row_group(row_group, columns=["id", *(field.name for field in _PAYLOAD_COLUMNS)])


def _fetched(table: pa.Table, number: int, row: LatentRow, where: str) -> Latent:
    if number >= table.num_rows:
        raise DatasetError(f"{where}: expected row {number} of its row group, which has {table.num_rows}")
    columns = table.slice(number, 1).to_pylist()[0]
    if columns["id"] != row.key:
        raise DatasetError(f"{where}: its index row leads to {columns['id']}")
    latent = _latent(row, columns, where)
    problem = tensor_problem(latent)
    if problem is not None:
        raise DatasetError(f"{where}: {problem}")
    return latent
