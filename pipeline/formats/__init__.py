"""Output formats: how the latents of one shard lie on disk. docs/format.md is the specification.

    FORMATS[name].write(path, latents, header) -> places       a shard from latents in stored order
    FORMATS[name].read(file), .read_header(file)               and back, checked
    FORMATS[name].fetch(file, index_rows)                      some of its latents
    write_index, read_index, iter_index, read_index_info       the index beside it
    blob_offsets(read, size, column, lengths)                  where the numbers are in a Parquet shard
    read_payload(bytes)                                        one range read of a tar to a tensor

A new format is a file with a class that follows `ShardFormat` and one line in FORMATS; the tests pick it up.
"""

from __future__ import annotations

from pipeline.formats.contract import IndexRow, PayloadPlace, ShardFormat
from pipeline.formats.header import HEADER_KEY, ShardHeader
from pipeline.formats.index import (
    INDEX_SCHEMA,
    IndexInfo,
    ShardIndex,
    iter_index,
    read_index,
    read_index_columns,
    read_index_info,
    write_index,
)
from pipeline.formats.parquet_blobs import blob_offsets
from pipeline.formats.parquet_format import SHARD_SCHEMA, ParquetFormat
from pipeline.formats.tensors import STORED_DTYPES, TORCH_DTYPES, read_payload
from pipeline.formats.webdataset_format import WebDatasetFormat
from pipeline.policies import FormatName

FORMATS: dict[FormatName, ShardFormat] = {
    "webdataset": WebDatasetFormat(),
    "parquet": ParquetFormat(),
}

__all__ = [
    "FORMATS",
    "HEADER_KEY",
    "INDEX_SCHEMA",
    "SHARD_SCHEMA",
    "STORED_DTYPES",
    "TORCH_DTYPES",
    "IndexInfo",
    "IndexRow",
    "PayloadPlace",
    "ShardFormat",
    "ShardHeader",
    "ShardIndex",
    "blob_offsets",
    "iter_index",
    "read_index",
    "read_index_columns",
    "read_index_info",
    "read_payload",
    "write_index",
]
