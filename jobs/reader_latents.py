"""Datasets of real latents as large as the reader's benchmark needs: some real clips encoded, their rows repeated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from jobs.bench_shards import real_shots, write_shards
from jobs.config import EncodeConfig
from pipeline.checkpoints import load_source
from pipeline.dataset import DatasetFolder, describe_file, index_name, shard_name
from pipeline.decode.pool import DecodePool
from pipeline.documents import Counts, Manifest, RunFile, ShardReceipt
from pipeline.encoder import TileEncoder
from pipeline.formats import FORMATS, ShardHeader, write_index
from pipeline.manifest import build_manifest, rows_per_bucket
from pipeline.policies import FormatName
from pipeline.records import Latent
from pipeline.run import plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder
from pipeline.storage import Store

FRAMES = 17


@dataclass(frozen=True, slots=True)
class RealLatents:
    """Windows of real clips, each encoded, with the documents of the dataset they are from."""

    run: RunFile
    receipt: ShardReceipt
    header: ShardHeader
    latents: tuple[Latent, ...]


def encode_real(
    folder: Path, *, vae: Mapping[str, Any], sides: Sequence[tuple[int, int]], logvar: bool
) -> RealLatents:
    """A window of 17 frames of each of two shots, 2.35 and 1.78 times as wide as high. A dataset is left in `folder`.

    `vae` is that section of an encode config, `sides` are buckets of (height, width).
    """
    shots = real_shots()
    tars = write_shards(folder / "clips", [shots[0], shots[-1]], num_shards=1, clips_per_shard=2)
    config = EncodeConfig.model_validate(
        {
            "source": {"kind": "webdataset", "urls": [str(tar) for tar in tars]},
            "output": {"url": str(folder / "encoded")},
            "vae": dict(vae),
            "windows": {"frames": FRAMES, "max_windows": 1},
            "resize": {"buckets": [list(side) for side in sides]},
            "encode": {"batch_pixels": FRAMES * max(height * width for height, width in sides), "logvar": logvar},
        }
    )
    plan = plan_run(config, config.model_dump(mode="json"))
    tiles = TileEncoder(load_source(config.vae), config.encode, torch.device("cpu"))
    with DecodePool(config.decode, num_children=1) as pool, ThreadPoolExecutor(1) as call:
        encoder = ShardEncoder(plan.job(), tiles, pool, Scratch())
        (stored,) = call.map(encoder.run, plan.todo)
    with Store(config.output.url).open_seekable(stored.receipt.payload.path) as file:
        header = FORMATS[config.output.format].read_header(file)
        latents = tuple(FORMATS[config.output.format].read(file))
    return RealLatents(plan.run_file, stored.receipt, header, latents)


def write_repeated(
    real: RealLatents, folder: Path, format_name: FormatName, *, num_shards: int, shard_bytes: int
) -> Manifest:
    """A finished dataset of `num_shards` shards with about `shard_bytes` of numbers, each row under its own key."""
    run = real.run.model_copy(update={"format": format_name})
    row_bytes = sum(latent_bytes(latent) for latent in real.latents) // len(real.latents)
    num_rows = max(len(real.latents), shard_bytes // row_bytes)
    receipts = [_write_shard(real, run, folder, f"{number:05d}", num_rows) for number in range(num_shards)]
    manifest = build_manifest(run, receipts, ())
    (folder / "run.json").write_bytes(run.to_bytes())
    DatasetFolder(Store(str(folder))).finish(manifest, "")
    return manifest


def latent_bytes(latent: Latent) -> int:
    """Of the stored numbers."""
    return latent.mean_CTHW.nbytes + (latent.logvar_CTHW.nbytes if latent.logvar_CTHW is not None else 0)


def _write_shard(real: RealLatents, run: RunFile, folder: Path, shard_id: str, num_rows: int) -> ShardReceipt:
    latents = _repeated(real.latents, shard_id, num_rows)
    shard_format = FORMATS[run.format]
    payload, index = folder / shard_name(shard_id, shard_format.suffix), folder / index_name(shard_id)
    for path in (payload, index):
        path.parent.mkdir(parents=True, exist_ok=True)
    header = real.header.model_copy(update={"shard_id": shard_id})
    places = shard_format.write(payload, iter(latents), header)
    stored = describe_file(shard_name(shard_id, shard_format.suffix), payload)
    rows = [latent.row for latent in latents]
    write_index(index, rows, places, header=header, shard_sha256=stored.sha256, shard_size=stored.size)
    return real.receipt.model_copy(
        update={
            "shard_id": shard_id,
            "payload": stored,
            "index": describe_file(index_name(shard_id), index),
            "counts": Counts(
                samples=num_rows, clips_encoded=num_rows, windows_decoded=num_rows, windows_stored=num_rows
            ),
            "buckets": rows_per_bucket(rows),
        }
    )


def _repeated(latents: Sequence[Latent], shard_id: str, num_rows: int) -> list[Latent]:
    def copies() -> Iterator[Latent]:
        for number, latent in enumerate(itertools.islice(itertools.cycle(latents), num_rows)):
            key = f"{shard_id}{number:06d}"
            row = replace(latent.row, key=f"{key}_00000", clip_key=key, window_index=0, shard_id=shard_id)
            yield replace(latent, row=row)

    return sorted(copies(), key=lambda latent: latent.row.sort_key)


def write_wide_manifest(manifest: Manifest, folder: Path, num_shards: int) -> None:
    """A dataset's manifest as if it had so many shards, and no shard: for what reads nothing else."""
    first = manifest.shards[0]
    shards = tuple(
        first.model_copy(update={"id": f"{number:05d}", "sha256": f"{number:064x}"}) for number in range(num_shards)
    )
    buckets = {name: rows * num_shards for name, rows in first.rows.items()}
    folder.mkdir(parents=True, exist_ok=True)
    DatasetFolder(Store(str(folder))).finish(manifest.model_copy(update={"shards": shards, "buckets": buckets}), "")
