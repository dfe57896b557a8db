"""What a reader knows of a dataset before it reads a shard: its documents, its buckets, its VAE."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from cvvae import VAESpec, spec_from_dict
from pipeline.dataset import MANIFEST, DatasetFolder
from pipeline.documents import Manifest
from pipeline.errors import DatasetError
from pipeline.formats import STORED_DTYPES, TORCH_DTYPES
from pipeline.manifest import build_manifest
from pipeline.reader.plan import ORDER_VERSION, BatchPlan, BucketRows, OrderSettings
from pipeline.storage import Store

Tolerated = Literal["unfinished", "mixed"]
_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)")


@dataclass(frozen=True, slots=True)
class Catalog:
    """A dataset's manifest and what follows from it. Reads one object, whatever the number of shards."""

    url: str
    manifest: Manifest
    spec: VAESpec
    tolerate: frozenset[Tolerated]

    @classmethod
    def open(cls, store: Store, tolerate: Collection[Tolerated] = ()) -> Catalog:
        """DatasetError unless the dataset is finished and of one identity, or `tolerate` says otherwise.

        Of an unfinished dataset the shards that have a receipt now are read: a later opening may find more.
        """
        unknown = set(tolerate) - {"unfinished", "mixed"}
        if unknown:
            raise ValueError(f"tolerate: expected 'unfinished' or 'mixed', got {sorted(unknown)}")
        url = store.full_url("")
        manifest = _manifest(DatasetFolder(store), "unfinished" in tolerate)
        found = manifest.identity.fingerprint
        if found != manifest.fingerprint and "mixed" not in tolerate:
            raise DatasetError(
                f"{store.full_url(MANIFEST)}: fingerprint: expected that of its identity, {found}, "
                f"got {manifest.fingerprint}"
            )
        try:
            spec = spec_from_dict(manifest.identity.vae)
        except (KeyError, TypeError, ValueError) as error:
            raise DatasetError(f"{url}: identity.vae: not a VAE that this release knows: {error}") from error
        return cls(url, manifest, spec, frozenset(tolerate))

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored numbers."""
        return TORCH_DTYPES[self.manifest.identity.storage_dtype]

    @property
    def logvar_dtype(self) -> torch.dtype:
        """Of the stored log variances: int8 where they are coded."""
        return STORED_DTYPES[self.manifest.identity.logvar_dtype]

    @property
    def has_logvar(self) -> bool:
        return bool(self.manifest.identity.logvar)

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale of the VAE's latents, float32 (C or 1, 1, 1, 1): z = (mean - shift) * scale."""
        shift, scale = (
            np.asarray(value, np.float32).reshape(-1, 1, 1, 1)
            for value in (self.spec.shift_factor, self.spec.scaling_factor)
        )
        return shift, scale

    def latent_shape(self, bucket: str) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a bucket."""
        try:
            return self.spec.latent_shape(*video_shape(bucket))
        except ValueError as error:
            raise DatasetError(f"{self.url}: bucket {bucket}: {error}") from error

    def bucket_rows(self, wanted: Collection[str] | None = None) -> tuple[BucketRows, ...]:
        """The runs of each bucket, in the order of their names; of all, or of those wanted (ValueError if absent)."""
        names = sorted(self.manifest.buckets)
        if wanted is not None and set(wanted) - set(names):
            raise ValueError(f"buckets: expected some of {names}, got {sorted(set(wanted) - set(names))}")
        runs: dict[str, list[tuple[int, int, int]]] = {name: [] for name in names}
        for number, shard in enumerate(self.manifest.shards):
            first = 0
            for name, rows in sorted(shard.rows.items()):
                if name not in runs:
                    raise DatasetError(f"{self.url}: shard {shard.id} has rows of a bucket {name} without a total")
                runs[name].append((number, first, rows))
                first += rows
        chosen = [name for name in names if (wanted is None or name in wanted) and runs[name]]
        return tuple(self._bucket(name, np.asarray(runs[name], np.int64)) for name in chosen)

    def _bucket(self, name: str, runs: np.ndarray) -> BucketRows:
        itemsize = self.dtype.itemsize + (self.logvar_dtype.itemsize if self.has_logvar else 0)
        numbers = int(np.prod(self.latent_shape(name)))
        return BucketRows(
            name=name, row_bytes=numbers * itemsize, shard=runs[:, 0], first=runs[:, 1], rows=runs[:, 2]
        )

    def order_of(self, plan: BatchPlan) -> str:
        """A short digest of all that decides which rows a numbered batch has."""
        settings: OrderSettings = plan.settings
        shards = [(shard.id, sorted(shard.rows.items())) for shard in self.manifest.shards]
        parts = [self.manifest.fingerprint, [bucket.name for bucket in plan.buckets], shards, ORDER_VERSION]
        parts += [settings.seed, settings.batch_size, settings.shuffle, settings.tail, settings.buffer_bytes]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _manifest(folder: DatasetFolder, unfinished: bool) -> Manifest:
    try:
        return folder.manifest()
    except DatasetError as error:
        if folder.store.info(MANIFEST) is not None:
            raise
        run = folder.run_file()
        if not unfinished:
            raise DatasetError(
                f"{folder.store.full_url('')}: unfinished: it has no {MANIFEST}. Start its encode job again, or read "
                "the shards that are there with tolerate=['unfinished']"
            ) from error
        ids = folder.receipt_ids()
        if not ids:
            raise DatasetError(f"{folder.store.full_url('')}: unfinished, and no shard is there yet") from error
        return build_manifest(run, folder.receipts(ids), ())


@functools.cache
def video_shape(bucket: str) -> tuple[int, int, int]:
    """(T, H, W) in frames and pixels of a bucket's name."""
    match = _BUCKET.fullmatch(bucket)
    if match is None:
        raise ValueError(f"bucket: expected TTTTTxHHHHHxWWWWW, got {bucket!r}")
    time, height, width = (int(part) for part in match.groups())
    return time, height, width
