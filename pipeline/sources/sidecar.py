"""video2dataset's sidecar: a Parquet file beside each tar with one row per sample and no video bytes."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage import open_seekable_url, open_stream

MAX_BYTES = 256 << 20
MAX_ROWS = 1_000_000
"""Beyond either it is no sidecar of a tar: video2dataset's have 10,000 rows by default."""
_CHUNK = 1 << 20
_DAMAGE = (pa.ArrowException, OSError, ValueError, ArithmeticError, LookupError, MemoryError)


def sidecar_url(tar_url: str) -> str:
    """00012.tar -> 00012.parquet."""
    return tar_url.removesuffix(".tar") + ".parquet"


def sidecar_keys(tar_url: str, options: dict[str, Any]) -> list[str]:
    """The keys a sidecar names, in its order; empty without a readable sidecar that has a key column.

    The sidecar is a hint written by others: one that cannot be read takes nothing away from the tar.
    """
    try:
        with open_stream(sidecar_url(tar_url), options) as stream:
            content = bytearray()
            while len(content) <= MAX_BYTES and (chunk := stream.read(_CHUNK)):
                content += chunk
    except FileNotFoundError:
        return []
    if len(content) > MAX_BYTES:
        return []
    try:
        # from memory: an OSError of the parser is damage, one of the store above is not and passes
        parquet = pq.ParquetFile(io.BytesIO(content))
        if parquet.metadata.num_rows > MAX_ROWS:
            return []
        keys = parquet.read(columns=["key"]).column("key").to_pylist()
    except _DAMAGE:
        return []
    return [str(key) for key in keys if key is not None]


def sidecar_num_rows(tar_url: str, options: dict[str, Any]) -> int | None:
    """Samples in the tar according to its sidecar's footer; None without a readable one."""
    try:
        with open_seekable_url(sidecar_url(tar_url), options) as file:
            number = int(pq.ParquetFile(file).metadata.num_rows)
    except (*_DAMAGE, StorageError):  # FileNotFoundError is an OSError
        return None
    return number if 0 <= number <= MAX_ROWS else None
