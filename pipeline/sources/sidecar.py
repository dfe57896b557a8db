"""video2dataset's sidecar: a Parquet file beside each tar with one row per sample and no video bytes."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import StorageError
from pipeline.storage import open_seekable_url, open_stream

_CHUNK = 1 << 20


def sidecar_url(tar_url: str) -> str:
    """00012.tar -> 00012.parquet."""
    return tar_url.removesuffix(".tar") + ".parquet"


def sidecar_keys(tar_url: str, options: dict[str, Any]) -> list[str]:
    """The keys a sidecar names, in its order; empty without a readable sidecar that has a key column.

    The sidecar is a hint written by others: one that cannot be read takes nothing away from the tar.
    """
    try:
        with open_stream(sidecar_url(tar_url), options) as stream:
            content = b"".join(iter(lambda: stream.read(_CHUNK) or b"", b""))
    except FileNotFoundError:
        return []
    try:
        # from memory: an OSError of the parser is damage, one of the store above is not and passes
        keys = pq.read_table(io.BytesIO(content), columns=["key"]).column("key").to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return []
    return [str(key) for key in keys if key is not None]


def sidecar_num_rows(tar_url: str, options: dict[str, Any]) -> int | None:
    """Samples in the tar according to its sidecar's footer; None without a readable one."""
    try:
        with open_seekable_url(sidecar_url(tar_url), options) as file:
            return int(pq.ParquetFile(file).metadata.num_rows)
    except (FileNotFoundError, pa.ArrowException, OSError, ValueError, StorageError):
        return None
