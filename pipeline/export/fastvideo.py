"""FastVideo's Parquet contract: its text-to-video schema, which its readers take column by column.

Raw mean, C T H W, float32: its trainers normalize themselves and read nothing but float32. Text embeddings, which a
dataset here does not have, are there and empty. Its map-style reader loads a whole row group for each row that it
takes, so row groups are small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.documents import RunIdentity
from pipeline.errors import ConfigError, DatasetError
from pipeline.export.contract import ExportedFile, ReadBack, WrittenFile
from pipeline.formats.tensors import raw_bytes, tensor_from_raw
from pipeline.records import Latent

ROW_GROUP_BYTES = 4 << 20
FASTVIDEO_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("vae_latent_bytes", pa.binary()),
        ("vae_latent_shape", pa.list_(pa.int64())),
        ("vae_latent_dtype", pa.string()),
        ("text_embedding_bytes", pa.binary()),
        ("text_embedding_shape", pa.list_(pa.int64())),
        ("text_embedding_dtype", pa.string()),
        ("file_name", pa.string()),
        ("caption", pa.string()),
        ("media_type", pa.string()),
        ("width", pa.int64()),
        ("height", pa.int64()),
        ("num_frames", pa.int64()),
        ("duration_sec", pa.float64()),
        ("fps", pa.float64()),
    ]
)
"""FastVideo's pyarrow_schema_t2v (fastvideo/dataset/dataloader/schema.py), names, types and order."""


@dataclass(frozen=True, slots=True)
class FastVideoExport:
    """EXPORTS["fastvideo"]: BUCKET/SHARD.parquet."""

    name: str = "fastvideo"

    def check(self, identity: RunIdentity, *, with_logvar: bool) -> None:
        if identity.logvar and with_logvar:
            raise ConfigError(
                "format fastvideo: its schema has no column for log variances, and this dataset stores them; "
                "--without-logvar exports the means alone"
            )

    def write(self, folder: Path, stem: str, latents: Iterable[Latent]) -> list[WrittenFile]:
        path = folder / f"{stem}.parquet"
        num_rows = 0
        with pq.ParquetWriter(
            path, FASTVIDEO_SCHEMA, compression="none", use_dictionary=False, write_page_checksum=True
        ) as writer:
            for rows in _row_groups(latents):
                writer.write_table(pa.Table.from_pylist(rows, schema=FASTVIDEO_SCHEMA), row_group_size=len(rows))
                num_rows += len(rows)
        return [WrittenFile(path=path, rows=num_rows, entry={})]

    def read(self, path: Path) -> Iterator[ReadBack]:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            if file.schema_arrow.remove_metadata() != FASTVIDEO_SCHEMA:
                raise DatasetError(f"{path.name}: expected the columns of FastVideo, got {file.schema_arrow.names}")
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, use_threads=False).to_pylist():
                    where = f"{path.name}: {row['id']}"
                    if row["vae_latent_dtype"] != "float32":
                        raise DatasetError(f"{where}: expected float32, got {row['vae_latent_dtype']}")
                    numbers = tensor_from_raw(row["vae_latent_bytes"], "float32", row["vae_latent_shape"], where)
                    yield ReadBack(key=row["id"], caption=row["caption"], mean_CTHW=numbers)

    def index(self, files: Sequence[ExportedFile]) -> dict[str, bytes]:
        return {}


def _row_groups(latents: Iterable[Latent]) -> Iterator[list[dict[str, Any]]]:
    rows: list[dict[str, Any]] = []
    size = 0
    for latent in latents:
        row = _columns(latent)
        if rows and size + len(row["vae_latent_bytes"]) > ROW_GROUP_BYTES:
            yield rows
            rows, size = [], 0
        rows.append(row)
        size += len(row["vae_latent_bytes"])
    if rows:
        yield rows


def _columns(latent: Latent) -> dict[str, Any]:
    row = latent.row
    return {
        "id": row.key,
        "vae_latent_bytes": raw_bytes(latent.mean_CTHW.to(torch.float32)),
        "vae_latent_shape": list(row.latent_shape),
        "vae_latent_dtype": "float32",
        "text_embedding_bytes": b"",
        "text_embedding_shape": [0, 0],
        "text_embedding_dtype": "float32",
        "file_name": row.file_name,
        "caption": row.caption,
        "media_type": "video",
        "width": row.width,
        "height": row.height,
        "num_frames": row.num_frames,
        "duration_sec": row.duration_sec,
        "fps": row.fps,
    }
