"""Shares of the plan to batches: pieces are read ahead by threads, held while they are needed, and put together."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DatasetError, StorageError
from pipeline.reader.catalog import Catalog, video_shape
from pipeline.reader.latent_batch import LatentBatch, LatentMaker, Reading, fraction_of
from pipeline.reader.pieces import LoadedPiece, PieceReader
from pipeline.reader.plan import BatchPlan, EpochPlan, Piece, Share, seed_of

OnCorrupt = Literal["raise", "skip"]
READ_AHEAD_BATCHES = 2
"""Beyond the one that is put together."""
UNREADABLE = (DatasetError, StorageError, FileNotFoundError)
_FRAME_COLUMNS = ("frame_times", "frame_indices")

log = logging.getLogger(__name__)
_Row = tuple[LoadedPiece, int]


class _Awaited:
    """A piece under way, or one that whoever wants it first will load."""

    __slots__ = ("_get", "_loaded")

    def __init__(self, get: Callable[[], LoadedPiece]) -> None:
        self._get = get
        self._loaded: LoadedPiece | Exception | None = None

    def result(self) -> LoadedPiece:
        """The piece, or the error that its loading ended with, each time."""
        if self._loaded is None:
            try:
                self._loaded = self._get()
            except UNREADABLE as error:
                self._loaded = error
        if isinstance(self._loaded, Exception):
            raise self._loaded
        return self._loaded


class BatchReader:
    """The batches of one worker of one rank, in order."""

    def __init__(
        self,
        catalog: Catalog,
        plan: BatchPlan,
        pieces: PieceReader,
        reading: Reading,
        *,
        lanes: range,
        on_corrupt: OnCorrupt,
        threads: int,
    ) -> None:
        self._catalog, self._plan, self._pieces, self._reading = catalog, plan, pieces, reading
        self._lanes, self._on_corrupt, self._threads = lanes, on_corrupt, threads
        self._maker = LatentMaker(catalog.dtype, catalog.logvar_dtype, catalog.factors(), reading)
        self._held: dict[Piece, _Awaited] = {}
        self._in_lane: dict[tuple[int, int], tuple[Piece, ...]] = {}
        self._last_epoch = -1
        self._bad_shards: set[int] = set()
        self._telling = Lock()
        self._epoch: EpochPlan | None = None

    def batches(self, numbers: Iterable[int]) -> Iterator[LatentBatch]:
        """The batches of these numbers, which rise; READ_AHEAD_BATCHES beyond the next are made ahead, by threads."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="latents")
        ahead: deque[tuple[int, Share, Future[LatentBatch]]] = deque()
        try:
            for number in numbers:
                epoch, step = self._plan.position(number)
                share = self._epoch_plan(epoch).share(step, self._lanes)
                # pieces first: the pool takes what it is given in turn, so no thread waits for a piece that has none
                pieces = [self._piece(pool, piece, share) for piece in share.pieces]
                ahead.append((epoch, share, pool.submit(self._batch, number, epoch, share, pieces)))
                if len(ahead) > READ_AHEAD_BATCHES:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            self._held.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def _piece(self, pool: ThreadPoolExecutor, piece: Piece, share: Share) -> _Awaited:
        held = self._held.get(piece)
        if held is None:
            load = partial(self._pieces.load, piece, self._bucket(share))
            held = self._held[piece] = _Awaited(pool.submit(load).result if self._pieces.fetches else load)
        return held

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self._plan.epoch(epoch)
        return self._epoch

    def _bucket(self, share: Share) -> str:
        return self._plan.buckets[share.bucket].name

    def _next(self, ahead: deque[tuple[int, Share, Future[LatentBatch]]]) -> LatentBatch:
        epoch, share, future = ahead.popleft()
        batch = future.result()
        self._let_go(epoch, share)
        return batch

    def _let_go(self, epoch: int, share: Share) -> None:
        """Forget what no later batch of this worker needs: finished pieces, and those that a lane has left.

        Where the number of workers does not divide the streams, another worker may get the last row of a piece.
        """
        if share.stream is not None:
            before = self._in_lane.get((share.bucket, share.stream), ())
            self._in_lane[share.bucket, share.stream] = share.pieces
            for left, piece in zip(before, share.pieces, strict=False):
                if left is not piece and left != piece:
                    self._held.pop(left, None)
        for piece in share.finished:
            self._held.pop(piece, None)
        if epoch != self._last_epoch:
            self._last_epoch = epoch
            for piece in [piece for piece in self._held if piece.epoch < epoch]:
                del self._held[piece]

    # --- rows that cannot be read ----------------------------------------------------------------------------------

    def _loaded(self, piece: Piece, awaited: _Awaited) -> LoadedPiece | None:
        """None for a piece that cannot be read, if those are skipped."""
        try:
            return awaited.result()
        except UNREADABLE as error:
            if self._on_corrupt == "raise":
                raise
            self._tell(piece, error)
            return None

    def _tell(self, piece: Piece, error: Exception) -> None:
        """Once for a shard: its other pieces will fail, too, or be read."""
        with self._telling:
            if piece.shard in self._bad_shards:
                return
            self._bad_shards.add(piece.shard)
        shard = self._catalog.manifest.shards[piece.shard]
        log.warning("shard %s: rows %d to %d are skipped: %s", shard.id, piece.first, piece.stop, error)

    def _try(self, found: _Row, share: Share) -> None:
        """Read a row's numbers for nothing but the error there may be."""
        piece, row = found
        size, catalog = math.prod(self._catalog.latent_shape(self._bucket(share))), self._catalog
        for column, dtype in ((piece.mean, catalog.dtype), (piece.logvar, catalog.logvar_dtype)):
            if column is not None:
                column.copy(row, memoryview(bytearray(size * dtype.itemsize)))

    def _without_bad(self, share: Share, rows: Sequence[_Row | None]) -> Iterator[_Row | None]:
        for piece, row in zip(share.pieces, rows, strict=True):
            try:
                if row is not None:
                    self._try(row, share)
                yield row
            except UNREADABLE as error:
                self._tell(piece, error)
                yield None

    def _replacements(self, number: int, share: Share, rows: Sequence[_Row | None]) -> Iterator[_Row]:
        """The rows of the share that can be read, again and again; else of the bucket's next batches."""
        good = [row for row in rows if row is not None] or [self._stand_in(number, share)]
        while True:
            yield from good

    def _stand_in(self, number: int, share: Share) -> _Row:
        epoch, step = self._plan.position(number)
        plan = self._plan.epoch(epoch)
        for other in (*range(step + 1, plan.num_batches), *range(step)):
            if plan.bucket_of(other) != share.bucket:
                continue
            candidate = plan.share(other, self._lanes)
            for piece, row in zip(candidate.pieces, candidate.rows, strict=True):
                try:
                    found = self._pieces.load(piece, self._bucket(share)), row - piece.first
                    self._try(found, share)
                    return found
                except UNREADABLE as error:
                    self._tell(piece, error)
        raise DatasetError(f"{self._catalog.url}: bucket {self._bucket(share)}: not one row of it can be read")

    # --- putting together ------------------------------------------------------------------------------------------

    def _batch(self, number: int, epoch: int, share: Share, pieces: Sequence[_Awaited]) -> LatentBatch:
        loaded = [self._loaded(piece, awaited) for piece, awaited in zip(share.pieces, pieces, strict=True)]
        rows = [
            None if piece is None else (piece, row - at.first)
            for piece, row, at in zip(loaded, share.rows, share.pieces, strict=True)
        ]
        try:
            return self._made(number, epoch, share, rows)
        except UNREADABLE:
            if self._on_corrupt == "raise":
                raise
        return self._made(number, epoch, share, list(self._without_bad(share, rows)))

    def _made(self, number: int, epoch: int, share: Share, found: Sequence[_Row | None]) -> LatentBatch:
        num_unreadable = found.count(None)
        rows, is_padding = [row for row in found if row is not None], share.is_padding
        if num_unreadable:
            spare = self._replacements(number, share, found)
            rows = [next(spare) if row is None else row for row in found]
            is_padding = [padding or row is None for padding, row in zip(is_padding, found, strict=True)]
        keys = [piece.keys[row] for piece, row in rows]
        seed = self._plan.settings.seed
        parts: list[tuple[object, ...]] = [()] * len(rows)
        if self._reading.draws:
            parts = [(seed, epoch, piece.shard_id, key) for (piece, _), key in zip(rows, keys, strict=True)]
        captions = [piece.captions[row] for piece, row in rows]
        dropout = self._reading.caption_dropout
        if dropout > 0:
            captions = [
                "" if fraction_of("caption", *part) < dropout else caption
                for part, caption in zip(parts, captions, strict=True)
            ]
        bucket = self._bucket(share)
        stored = [(piece.mean, piece.logvar, row) for piece, row in rows]
        latents = self._maker.batch(self._catalog.latent_shape(bucket), stored, parts)
        columns = {name: [piece.columns[name][row] for piece, row in rows] for name in self._reading.columns}
        latents, columns = self._sub_windows(bucket, latents, columns, parts)
        return LatentBatch(
            latents_BCTHW=latents,
            captions=captions,
            keys=keys,
            shard_ids=[piece.shard_id for piece, _ in rows],
            bucket=bucket,
            columns=columns,
            is_padding_B=torch.from_numpy(np.array(is_padding)),
            num_unreadable=num_unreadable,
            epoch=epoch,
            number=number,
        )

    def _sub_windows(
        self, bucket: str, latents: Tensor, columns: dict[str, list], parts: Sequence[tuple[object, ...]]
    ) -> tuple[Tensor, dict[str, list]]:
        sub_window = self._reading.sub_window
        time, height, width = video_shape(bucket)
        if sub_window is None or time <= sub_window.frames:
            return latents, columns
        spec = self._catalog.spec
        length = sub_window.latent_frames(spec, time, height, width)
        starts = [0] * len(parts)
        if sub_window.start == "random":
            starts = [seed_of("start", *part) % (latents.shape[2] - length + 1) for part in parts]
        cut = torch.stack([one[:, start : start + length] for one, start in zip(latents, starts, strict=True)])
        frames = [(spec.frame_span(start)[0], spec.frame_span(start + length - 1)[1]) for start in starts]

        def trimmed(values: list) -> list:
            return [value[first:stop] for value, (first, stop) in zip(values, frames, strict=True)]

        return cut, {name: trimmed(of) if name in _FRAME_COLUMNS else of for name, of in columns.items()}
