"""The fields of a row as Arrow columns, and what Parquet shards and the index share in how they are stored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import DatasetError
from pipeline.formats.header import HEADER_KEY, ShardHeader, name_of

_INTEGERS = pa.list_(pa.int64())
_FLOATS = pa.list_(pa.float64())

ROW_COLUMNS: list[pa.Field] = [
    pa.field("id", pa.string()),
    pa.field("clip_key", pa.string()),
    pa.field("window_index", pa.int64()),
    pa.field("shard_id", pa.string()),
    pa.field("bucket", pa.string()),
    pa.field("caption", pa.string()),
    pa.field("file_name", pa.string()),
    pa.field("media_type", pa.string()),
    pa.field("width", pa.int64()),
    pa.field("height", pa.int64()),
    pa.field("num_frames", pa.int64()),
    pa.field("duration_sec", pa.float64()),
    pa.field("fps", pa.float64()),
    pa.field("frame_indices", _INTEGERS),
    pa.field("frame_times", _FLOATS),
    pa.field("padded_frames", pa.int64()),
    pa.field("trimmed_frames", pa.int64()),
    pa.field("crop", _FLOATS),
    pa.field("source_width", pa.int64()),
    pa.field("source_height", pa.int64()),
    pa.field("source_sample_aspect_ratio", pa.float64()),
    pa.field("source_rotation", pa.int64()),
    pa.field("source_fps", pa.float64()),
    pa.field("source_duration_sec", pa.float64()),
    pa.field("source_codec", pa.string()),
    pa.field("source_decoder", pa.string()),
    pa.field("video_sha256", pa.string()),
    pa.field("pair_sha256", pa.string()),
    pa.field("metadata", pa.string()),
    pa.field("has_logvar", pa.bool_()),
    pa.field("vae_latent_dtype", pa.string()),
    pa.field("vae_latent_shape", _INTEGERS),
]
"""One per field of fields.RowFields, in its order; all nullable, as FastVideo has them."""


def leaf_path(field: pa.Field) -> str:
    """The name by which Parquet knows the column's values."""
    return f"{field.name}.list.element" if pa.types.is_list(field.type) else field.name


@contextlib.contextmanager
def open_parquet(file: Path | BinaryIO) -> Iterator[pq.ParquetFile]:
    """Open for checked reading. Damage found while it is open is a DatasetError."""
    with damage_named(name_of(file)):
        if not isinstance(file, Path):
            file.seek(0)
        parquet = pq.ParquetFile(file, page_checksum_verification=True)
        try:
            yield parquet
        finally:
            parquet.close()


@contextlib.contextmanager
def damage_named(where: str) -> Iterator[None]:
    """pyarrow's errors about a file's content become DatasetError; a store's errors stay what they are."""
    try:
        yield
    except (pa.ArrowException, UnicodeDecodeError) as error:  # a column name or a string that is not UTF-8
        raise DatasetError(f"{where}: not a whole Parquet file: {error}") from error
    except OSError as error:
        # Arrow reports damaged pages as a bare OSError; those of files and networks have a number or a subclass
        if type(error) is not OSError or error.errno is not None:
            raise
        raise DatasetError(f"{where}: damaged Parquet file: {error}") from error


def header_of(parquet: pq.ParquetFile, where: str) -> ShardHeader:
    """The shard header in the file's key-value metadata."""
    return ShardHeader.from_bytes(metadata_value(parquet, HEADER_KEY, where), f"{where}: {HEADER_KEY}")


def metadata_value(parquet: pq.ParquetFile, key: str, where: str) -> bytes:
    value = (parquet.metadata.metadata or {}).get(key.encode())
    if value is None:
        raise DatasetError(f"{where}: no {key} in its metadata: not one of our files")
    return value


def require_columns(parquet: pq.ParquetFile, expected: pa.Schema, where: str) -> None:
    """DatasetError unless all of our columns are there with their types; others do not matter."""
    found = parquet.schema_arrow
    for field in expected:
        if field.name not in found.names:
            raise DatasetError(f"{where}: column {field.name} is missing")
        actual = found.field(field.name).type
        if actual != field.type:
            raise DatasetError(f"{where}: column {field.name}: expected {field.type}, got {actual}")


def rows_of(parquet: pq.ParquetFile, columns: list[str], row_group: int, batch_rows: int) -> Iterator[dict[str, Any]]:
    """A row group's rows as dicts, a batch at a time. ArrowInvalid if there are fewer than the footer says."""
    count = 0
    for batch in parquet.iter_batches(batch_rows, row_groups=[row_group], columns=columns, use_threads=False):
        count += batch.num_rows
        yield from batch.to_pylist()
    expected = parquet.metadata.row_group(row_group).num_rows
    if count != expected:  # page headers have no checksum, and Arrow stops at the shortest column
        raise pa.ArrowInvalid(f"row group {row_group}: expected {expected} rows, got {count}")
