"""Shares of the plan to batches: pieces are asked for ahead, held while they are needed, and put together."""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DatasetError
from pipeline.reader.catalog import Catalog, video_shape
from pipeline.reader.held import UNREADABLE, Awaited, HeldPieces
from pipeline.reader.latent_batch import LatentBatch, LatentMaker, Reading, fraction_of
from pipeline.reader.pieces import LoadedPiece, PieceReader
from pipeline.reader.plan import BatchPlan, EpochPlan, Piece, Share, seed_of

OnCorrupt = Literal["raise", "skip"]
MADE_AHEAD = 2
"""Batches beyond the next one."""
AHEAD_BATCHES, AHEAD_BYTES = 16, 64 << 20
"""Whose pieces are asked for before they are made: at most so many batches, and no more once it is so many bytes."""
_FRAME_COLUMNS = ("frame_times", "frame_indices")

log = logging.getLogger(__name__)
_Row = tuple[LoadedPiece, int]


class _Planned(NamedTuple):
    """A batch whose pieces have been asked for."""

    number: int
    epoch: int
    share: Share
    pieces: list[Awaited]
    """Of each row."""
    asked_bytes: int
    """Of those that had to be loaded for it."""


def _load_all(pieces: Sequence[Awaited]) -> None:
    for piece in pieces:
        with contextlib.suppress(*UNREADABLE):  # raised again when a row of it is wanted
            piece.result()


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
        self._lanes, self._on_corrupt = lanes, on_corrupt
        self._maker = LatentMaker(catalog.dtype, catalog.logvar_dtype, catalog.factors(), reading)
        part = len(lanes) / plan.settings.batch_size
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="latents")
        self._held = HeldPieces(self._load, int(plan.settings.buffer_bytes * part))
        self._unread: list[Awaited] = []
        self._planned: deque[_Planned] = deque()
        self._asked: dict[tuple[int, int], tuple[Sequence[Piece], list[Awaited]]] = {}
        """Of each bucket and stream, what its lanes have in the batch that was planned last."""
        self._given: dict[tuple[int, int], Sequence[Piece]] = {}
        """The same for the batch that was given last."""
        self._last_epoch = -1
        self._bad_shards: set[int] = set()
        self._telling = Lock()
        self._epoch: EpochPlan | None = None

    def batches(self, numbers: Iterable[int]) -> Iterator[LatentBatch]:
        """The batches of these numbers, which rise. Once: what is held is let go at the end.

        Threads read ahead, for as many batches as AHEAD_BYTES are, and make the next batches of what is there. They
        take in turn what they are given, pieces before their batch, so none waits for a piece that no other has.
        """
        left = iter(numbers)
        making: deque[tuple[_Planned, Future[LatentBatch]]] = deque()
        try:
            while True:
                self._plan_ahead(left)
                while self._planned and len(making) <= MADE_AHEAD:
                    planned = self._planned.popleft()
                    making.append((planned, self._pool.submit(self._batch, planned)))
                    self._plan_ahead(left)
                if not making:
                    return
                planned, future = making.popleft()
                batch = future.result()
                self._let_go(planned)
                yield batch
        finally:
            self._pool.shutdown(wait=True, cancel_futures=True)
            # now: they refer back to this reader, and Python finds such circles late
            self._held.clear()
            self._asked.clear()
            self._planned.clear()

    def _plan_ahead(self, numbers: Iterator[int]) -> None:
        """At least one batch, if one is left."""
        ahead = sum(planned.asked_bytes for planned in self._planned)
        while not self._planned or (len(self._planned) < AHEAD_BATCHES and ahead < AHEAD_BYTES):
            number = next(numbers, None)
            if number is None:
                return
            epoch, step = self._plan.position(number)
            share, before = self._epoch_plan(epoch).share(step, self._lanes), self._held.asked_bytes
            pieces = self._ask(share)
            if self._unread:  # quick ones: a task for each would cost more than they do
                self._pool.submit(_load_all, self._unread)
                self._unread = []
            asked_bytes = self._held.asked_bytes - before
            self._planned.append(_Planned(number, epoch, share, pieces, asked_bytes))
            ahead += asked_bytes

    def _ask(self, share: Share) -> list[Awaited]:
        """The piece of each row: most lanes are still in the one of the batch before."""
        row_bytes, nothing = self._plan.buckets[share.bucket].row_bytes, itertools.repeat(None)
        lanes = (share.bucket, share.stream or 0)
        before = self._asked.get(lanes) if share.stream is not None else None
        pieces = [
            held
            if held is not None and piece is old
            else self._held.get(piece, (piece.stop - piece.first) * row_bytes)
            for piece, old, held in zip(share.pieces, *(before or (nothing, nothing)), strict=False)
        ]
        if share.stream is not None:
            self._asked[lanes] = share.pieces, pieces
        return pieces

    def _load(self, piece: Piece) -> Awaited:
        load = partial(self._pieces.load, piece, self._plan.buckets[piece.bucket].name)
        if self._pieces.fetches:
            return Awaited(self._pool.submit(load).result)
        self._unread.append(awaited := Awaited(load))
        return awaited

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self._plan.epoch(epoch)
        return self._epoch

    def _bucket(self, share: Share) -> str:
        return self._plan.buckets[share.bucket].name

    def _let_go(self, planned: _Planned) -> None:
        """Forget what no later batch of this worker needs: finished pieces, and those that a lane has left.

        Where the number of workers does not divide the streams, another worker may get the last row of a piece.
        """
        share = planned.share
        if share.stream is not None:
            before = self._given.get((share.bucket, share.stream), ())
            self._given[share.bucket, share.stream] = share.pieces
            left = zip(before, share.pieces, strict=False)
            self._held.let_go(old for old, piece in left if old is not piece and old != piece)
        self._held.let_go(share.finished)
        if planned.epoch != self._last_epoch:
            self._last_epoch = planned.epoch
            self._held.let_go_before(planned.epoch)
            if not self._pieces.fetches:  # what the system has dropped meanwhile is to be read ahead again
                self._held.let_go_blocks()

    # --- rows that cannot be read ----------------------------------------------------------------------------------

    def _row(self, piece: Piece, awaited: Awaited, row: int) -> _Row | None:
        """None for a row of a piece that cannot be read, if those are skipped."""
        try:
            return awaited.result(), row - piece.first
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

    def _replacements(self, planned: _Planned, rows: Sequence[_Row | None]) -> Iterator[_Row]:
        """The rows of the share that can be read, again and again; else of the bucket's next batches."""
        good = [row for row in rows if row is not None] or [self._stand_in(planned)]
        while True:
            yield from good

    def _stand_in(self, planned: _Planned) -> _Row:
        (epoch, step), bucket = self._plan.position(planned.number), planned.share.bucket
        plan, name = self._plan.epoch(epoch), self._bucket(planned.share)
        for other in (*range(step + 1, plan.num_batches), *range(step)):
            if plan.bucket_of(other) != bucket:
                continue
            candidate = plan.share(other, self._lanes)
            for piece, row in zip(candidate.pieces, candidate.rows, strict=True):
                try:
                    found = self._pieces.load(piece, name), row - piece.first
                    self._try(found, planned.share)
                    return found
                except UNREADABLE as error:
                    self._tell(piece, error)
        raise DatasetError(f"{self._catalog.url}: bucket {name}: not one row of it can be read")

    # --- putting together ------------------------------------------------------------------------------------------

    def _batch(self, planned: _Planned) -> LatentBatch:
        share = planned.share
        found = [self._row(*one) for one in zip(share.pieces, planned.pieces, share.rows, strict=True)]
        try:
            return self._made(planned, found)
        except UNREADABLE:
            if self._on_corrupt == "raise":
                raise
        return self._made(planned, list(self._without_bad(share, found)))

    def _made(self, planned: _Planned, found: Sequence[_Row | None]) -> LatentBatch:
        share, epoch = planned.share, planned.epoch
        num_unreadable = found.count(None)
        rows, is_padding = [row for row in found if row is not None], share.is_padding
        if num_unreadable:
            spare = self._replacements(planned, found)
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
            number=planned.number,
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
