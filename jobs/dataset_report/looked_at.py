"""Some windows of every bucket, decoded: figures of all of them, pictures of a few."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from cvvae import spec_from_dict
from jobs.dataset_report.seams import SeamMeter
from jobs.evaluation.examples import shrunk
from pipeline.dataset import DatasetFolder, index_name
from pipeline.decode_back import DecodeBack, WindowPair
from pipeline.documents import Manifest
from pipeline.errors import DatasetError, SourceError, StorageError
from pipeline.formats import IndexRow, read_index

SHARDS_PER_BUCKET = 2
"""Windows of a bucket are taken from so many shards: a source shard is read from its start up to the last of them."""

SHOWN_FRAMES = 49
"""Enough to see the borders between three tiles of 17 frames."""


@dataclass(frozen=True, slots=True)
class Look:
    """One window: figures, its latent, and frames made small."""

    key: str
    shard_id: str
    caption: str
    fps: float | None
    psnr_T: tuple[float, ...]
    psnr: float
    ssim: float | None
    latent_CTHW: Tensor
    source_THWC: np.ndarray
    decoded_THWC: np.ndarray


@dataclass(slots=True)
class BucketLooks:
    """The windows of one bucket that were looked at, in an order that chance (by key) decides."""

    bucket: str
    stored: int
    seams: SeamMeter
    looks: list[Look] = field(default_factory=list)

    def worst(self, number: int) -> list[Look]:
        return sorted(self.looks, key=lambda look: look.psnr)[:number]


def choose_windows(dataset: DatasetFolder, manifest: Manifest, per_bucket: int) -> dict[str, list[IndexRow]]:
    """By shard, up to `per_bucket` windows of every bucket. A function of ids and keys alone: the same page again."""
    chosen: dict[str, list[IndexRow]] = {}
    for bucket in manifest.buckets:
        holders = sorted((shard.id for shard in manifest.shards if bucket in shard.rows), key=_chance)
        holders = holders[:SHARDS_PER_BUCKET]
        for number, shard_id in enumerate(holders):
            with dataset.open_seekable(index_name(shard_id)) as file:
                rows = [row for row in read_index(file).rows if row.row.bucket == bucket]
            share = per_bucket * (number + 1) // len(holders) - per_bucket * number // len(holders)
            chosen.setdefault(shard_id, []).extend(sorted(rows, key=lambda row: _chance(row.row.key))[:share])
    return chosen


def look_at(
    back: DecodeBack,
    manifest: Manifest,
    chosen: dict[str, list[IndexRow]],
    notes: list[str],
    on_window: Callable[[], None] = lambda: None,
) -> list[BucketLooks]:
    """Decode the chosen windows. A shard whose source or payload cannot be read is a note, and its windows are left
    out."""
    spec = spec_from_dict(manifest.identity.vae)
    buckets = {name: BucketLooks(name, stored, SeamMeter(spec)) for name, stored in manifest.buckets.items()}
    for shard_id, rows in sorted(chosen.items()):
        for pair in _readable(back, shard_id, rows, notes):
            found = buckets[pair.row.bucket]
            found.seams.add(pair)
            found.looks.append(_look(pair))
            on_window()
    for found in buckets.values():
        found.looks.sort(key=lambda look: _chance(look.key))
    return list(buckets.values())


def _readable(back: DecodeBack, shard_id: str, rows: list[IndexRow], notes: list[str]) -> Iterator[WindowPair]:
    try:
        yield from back.pairs(shard_id, rows)
    except (DatasetError, SourceError, StorageError) as error:
        notes.append(f"Windows of shard {shard_id} could not be looked at: {error}")


def _look(pair: WindowPair) -> Look:
    return Look(
        key=pair.row.key,
        shard_id=pair.row.shard_id,
        caption=pair.row.caption,
        fps=pair.row.fps,
        psnr_T=pair.psnr_T,
        psnr=pair.psnr,
        ssim=pair.ssim,
        latent_CTHW=pair.latent_CTHW,
        source_THWC=shrunk(pair.source_THWC, max_frames=SHOWN_FRAMES),
        decoded_THWC=shrunk(pair.decoded_THWC, max_frames=SHOWN_FRAMES),
    )


def _chance(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
