"""`LatentDataset`: what a trainer reads a dataset with."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from torch import distributed
from torch.utils.data import IterableDataset, get_worker_info

from pipeline.formats import INDEX_SCHEMA
from pipeline.reader.batches import BatchReader, OnCorrupt
from pipeline.reader.cache import RangeCache
from pipeline.reader.catalog import Catalog, Tolerated, video_shape
from pipeline.reader.latent_batch import LatentBatch, Reading, SubWindow
from pipeline.reader.pieces import PieceReader
from pipeline.reader.plan import BatchPlan, OrderSettings, Tail
from pipeline.storage import Store

LOCAL_THREADS, REMOTE_THREADS = 2, 16

log = logging.getLogger(__name__)


class ReaderState(TypedDict):
    """What to keep in a checkpoint: JSON, the same for all ranks."""

    batches: int
    """Global batches consumed."""
    order: str
    """Digest of what decides which rows a batch has: dataset, seed, batch size, shuffling."""


class LatentDataset(IterableDataset[LatentBatch]):
    """Batches of latents of one shape, shuffled, shared out over ranks, resumable.

    Give it to a DataLoader with batch_size=None, or iterate it. The sequence of global batches is a function of the
    dataset, seed, epoch and batch size (and of shuffle, tail, buffer_bytes); ranks and workers share it out.

    url, options       the dataset's folder: a local path or an fsspec URL, and options of its store
    batch_size         rows of a global batch, over all ranks: a multiple of world_size
    epochs             where to stop, counted from the very first; None: never
    start              global batches consumed before, or what `state` gave
    rank, world_size   default: those of torch.distributed if it is initialized, else 0 of 1
    tail               "drop" what is left of a bucket, or "pad" it to a batch with rows of its own
    buffer_bytes       of latents that all ranks together hold for shuffling; more means larger reads
    buckets            names of those to read; default: all
    latents            "normalized", (z - shift) * scale, or "raw" as stored
    sample             the posterior's "mean", or a "sample" (needs stored log variances), fresh in every epoch
    columns            fields of the index (docs/format.md) to have in `LatentBatch.columns`
    caption_dropout    the part of captions to replace by "", others in every epoch
    sub_window         cut longer windows, see `SubWindow`
    on_corrupt         "raise" what names the shard, or "skip": its rows are replaced, marked and counted
    checksums          compare a shard's sha256 before its first use: each process reads each shard once more
    tolerate           "unfinished", "mixed"
    cache, cache_bytes a folder for what was fetched from a store, and its bound
    threads            that read, per worker; default: 2 for local datasets, 16 for others
    """

    def __init__(
        self,
        url: str,
        batch_size: int,
        *,
        seed: int = 0,
        epochs: int | None = 1,
        start: int | ReaderState = 0,
        rank: int | None = None,
        world_size: int | None = None,
        shuffle: bool = True,
        tail: Tail = "drop",
        buffer_bytes: int = 1 << 30,
        buckets: Collection[str] | None = None,
        latents: Literal["normalized", "raw"] = "normalized",
        sample: Literal["mean", "sample"] = "mean",
        dtype: torch.dtype = torch.float32,
        columns: Sequence[str] = (),
        caption_dropout: float = 0.0,
        sub_window: SubWindow | None = None,
        on_corrupt: OnCorrupt = "raise",
        checksums: bool = False,
        tolerate: Collection[Tolerated] = (),
        cache: str | Path | None = None,
        cache_bytes: int = 64 << 30,
        options: Mapping[str, Any] | None = None,
        threads: int | None = None,
    ) -> None:
        """Reads the manifest. ValueError for settings that do not fit, DatasetError for a dataset not whole."""
        super().__init__()
        self._url, self._options = url, dict(options or {})
        self.reading = Reading(
            latents=latents,
            sample=sample,
            dtype=dtype,
            columns=tuple(columns),
            caption_dropout=caption_dropout,
            sub_window=sub_window,
        )
        # kept for forked workers: what they drop of an inherited client, its connections and their place in a shared
        # epoll, this process would wait for in vain at its next request
        self._store = store = Store(url, options=self._options)
        self.catalog = Catalog.open(store, tolerate)
        self._check_reading()
        order = OrderSettings(seed=seed, batch_size=batch_size, shuffle=shuffle, tail=tail, buffer_bytes=buffer_bytes)
        self.plan = BatchPlan(self.catalog.bucket_rows(buckets), order)
        self._check_plan()
        self.rank, self.world_size = _place(rank, world_size)
        self._lanes = self.plan.lanes(self.rank, self.world_size)
        self.epochs, self.start = epochs, self._count(start)
        if on_corrupt not in ("raise", "skip"):
            raise ValueError(f"on_corrupt: expected 'raise' or 'skip', got {on_corrupt!r}")
        self._on_corrupt: OnCorrupt = on_corrupt
        self._checksums = checksums
        self._cache = None if cache is None or store.is_local else (Path(cache), cache_bytes)
        if self._cache is not None:
            RangeCache(*self._cache)  # refuses a bound that is too small
        self._threads = threads or (LOCAL_THREADS if store.is_local else REMOTE_THREADS)

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def batches_per_epoch(self) -> int:
        """Global batches, which is also the number of batches that each rank sees."""
        return self.plan.batches_per_epoch

    @property
    def num_rows(self) -> int:
        return sum(bucket.num_rows for bucket in self.plan.buckets)

    def state(self, consumed: int) -> ReaderState:
        """To resume after so many global batches, `LatentBatch.consumed` of the last one used."""
        return {"batches": consumed, "order": self.catalog.order_of(self.plan)}

    def __iter__(self) -> Iterator[LatentBatch]:
        """From `start` on; in a DataLoader's worker, every n-th batch of that."""
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker is not None else (0, 1)
        first += self.start
        numbers = (
            itertools.count(first, step)
            if self.epochs is None
            else range(first, self.epochs * self.batches_per_epoch, step)
        )
        pieces = PieceReader(
            self.catalog,
            Store(self._url, options=self._options),  # a client is not carried over a fork
            columns=self.reading.columns,
            logvar=self.reading.sample == "sample",
            cache=RangeCache(*self._cache) if self._cache is not None else None,
            checksums=self._checksums,
        )
        reader = BatchReader(
            self.catalog,
            self.plan,
            pieces,
            self.reading,
            lanes=self._lanes,
            on_corrupt=self._on_corrupt,
            threads=self._threads,
        )
        return reader.batches(numbers)

    # --- checks ----------------------------------------------------------------------------------------------------

    def _check_reading(self) -> None:
        reading, catalog = self.reading, self.catalog
        unknown = sorted(set(reading.columns) - set(INDEX_SCHEMA.names))
        if unknown:
            raise ValueError(f"columns: expected some of {INDEX_SCHEMA.names}, got {unknown}")
        if reading.sample == "sample" and not catalog.has_logvar:
            raise ValueError(
                f"sample='sample': {catalog.url} has no log variances: it was encoded without output.logvar"
            )

    def _check_plan(self) -> None:
        size, url = self.plan.settings.batch_size, self.catalog.url
        if self.reading.sub_window is not None:
            for bucket in self.plan.buckets:
                self.reading.sub_window.latent_frames(self.catalog.spec, *video_shape(bucket.name))
        if not self.batches_per_epoch:
            rows = {bucket.name: bucket.num_rows for bucket in self.plan.buckets}
            raise ValueError(
                f"{url}: no bucket has a batch of batch_size={size}: {rows or 'there are no rows'}; see tail='pad'"
            )
        if self.plan.too_small:
            log.warning(
                "%s: buckets with less than a batch of %d rows, which are never read: %s. Read them with tail='pad', "
                "or a smaller batch",
                url,
                size,
                self.plan.too_small,
            )

    def _count(self, start: int | ReaderState) -> int:
        if isinstance(start, int):
            count = start
        else:
            count, order = start["batches"], self.catalog.order_of(self.plan)
            if start["order"] != order:
                raise ValueError(
                    f"start: expected a state of the order {order}, got {start['order']}: the dataset, or seed, "
                    "batch_size, shuffle, tail, buffer_bytes or buckets differ from those it was saved with"
                )
        if count < 0:
            raise ValueError(f"start: expected at least 0 batches, got {count}")
        return count


def _place(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError(f"expected both rank and world_size or neither, got {rank} and {world_size}")
    if rank is not None and world_size is not None:
        return rank, world_size
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
