"""Shares of the plan to batches: pieces are read ahead by threads, held while they are needed, and put together."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import DatasetError, StorageError
from pipeline.reader.catalog import Catalog, video_shape
from pipeline.reader.latent_batch import (
    LatentBatch,
    Reading,
    as_float32,
    finished_latents,
    fraction_of,
    noise,
)
from pipeline.reader.pieces import LoadedPiece, PieceReader
from pipeline.reader.plan import BatchPlan, EpochPlan, Piece, Share, seed_of

OnCorrupt = Literal["raise", "skip"]
READ_AHEAD_BATCHES = 2
"""Beyond the one that is put together."""
UNREADABLE = (DatasetError, StorageError, FileNotFoundError)
_FRAME_COLUMNS = ("frame_times", "frame_indices")

log = logging.getLogger(__name__)
_Row = tuple[LoadedPiece, int]


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
        self._factors = catalog.factors()
        self._held: dict[Piece, Future[LoadedPiece]] = {}
        self._in_lane: dict[tuple[int, int, int], Piece] = {}
        self._last_epoch = -1
        self._bad_shards: set[int] = set()
        self._epoch: EpochPlan | None = None

    def batches(self, numbers: Iterable[int]) -> Iterator[LatentBatch]:
        """The batches of these numbers, which rise; as many as READ_AHEAD_BATCHES are read ahead."""
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="latents")
        ahead: deque[tuple[int, int, Share]] = deque()
        try:
            for number in numbers:
                epoch, step = self._plan.position(number)
                share = self._epoch_plan(epoch).share(step, self._lanes)
                for piece in dict.fromkeys(share.pieces):
                    if piece not in self._held:
                        self._held[piece] = pool.submit(self._pieces.load, piece, self._bucket(share))
                ahead.append((number, epoch, share))
                if len(ahead) > READ_AHEAD_BATCHES:
                    yield self._next(ahead)
            while ahead:
                yield self._next(ahead)
        finally:
            self._held.clear()
            pool.shutdown(wait=True, cancel_futures=True)

    def _epoch_plan(self, epoch: int) -> EpochPlan:
        if self._epoch is None or self._epoch.epoch != epoch:
            self._epoch = self._plan.epoch(epoch)
        return self._epoch

    def _bucket(self, share: Share) -> str:
        return self._plan.buckets[share.bucket].name

    def _next(self, ahead: deque[tuple[int, int, Share]]) -> LatentBatch:
        number, epoch, share = ahead.popleft()
        rows = [self._row(piece, row - piece.first) for piece, row in zip(share.pieces, share.rows, strict=True)]
        batch = self._batch(number, epoch, share, rows)
        self._let_go(epoch, share)
        return batch

    def _let_go(self, epoch: int, share: Share) -> None:
        """Forget what no later batch of this worker needs: finished pieces, and those that a lane has left.

        Where the number of workers does not divide the streams, another worker may get the last row of a piece.
        """
        if share.stream is not None:
            for lane, piece in enumerate(share.pieces):
                left = self._in_lane.get((share.bucket, share.stream, lane))
                self._in_lane[share.bucket, share.stream, lane] = piece
                if left is not None and left != piece:
                    self._held.pop(left, None)
        for piece in share.finished:
            self._held.pop(piece, None)
        if epoch != self._last_epoch:
            self._last_epoch = epoch
            for piece in [piece for piece in self._held if piece.epoch < epoch]:
                del self._held[piece]

    # --- rows that cannot be read ----------------------------------------------------------------------------------

    def _row(self, piece: Piece, row: int) -> _Row | None:
        """None for a row that cannot be read, if those are skipped."""
        try:
            return self._held[piece].result(), row
        except UNREADABLE as error:
            if self._on_corrupt == "raise":
                raise
            self._tell(piece, error)
            return None

    def _tell(self, piece: Piece, error: Exception) -> None:
        """Once for a shard: its other pieces will fail, too, or be read."""
        if piece.shard not in self._bad_shards:
            self._bad_shards.add(piece.shard)
            shard = self._catalog.manifest.shards[piece.shard]
            log.warning("shard %s: rows %d to %d are skipped: %s", shard.id, piece.first, piece.stop, error)

    def _replacements(self, number: int, share: Share, rows: list[_Row | None]) -> Iterator[_Row]:
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
                    return self._pieces.load(piece, self._bucket(share)), row - piece.first
                except UNREADABLE as error:
                    self._tell(piece, error)
        raise DatasetError(f"{self._catalog.url}: bucket {self._bucket(share)}: not one row of it can be read")

    # --- putting together ------------------------------------------------------------------------------------------

    def _batch(self, number: int, epoch: int, share: Share, found: list[_Row | None]) -> LatentBatch:
        spare = self._replacements(number, share, found)
        rows = [next(spare) if row is None else row for row in found]
        is_padding = [padding or row is None for padding, row in zip(share.is_padding, found, strict=True)]
        bucket, names = self._bucket(share), self._reading.columns
        seed = self._plan.settings.seed
        fields = [piece.fields(row, ("id", "caption", *names)) for piece, row in rows]
        parts = [(seed, epoch, piece.shard_id, one[0]) for (piece, _), one in zip(rows, fields, strict=True)]
        latents = self._latents(bucket, rows, parts)
        columns = {name: [one[2 + at] for one in fields] for at, name in enumerate(names)}
        latents, columns = self._sub_windows(bucket, latents, columns, parts)
        dropout = self._reading.caption_dropout
        return LatentBatch(
            latents_BCTHW=latents,
            captions=[
                "" if fraction_of("caption", *part) < dropout else one[1]
                for part, one in zip(parts, fields, strict=True)
            ],
            keys=[one[0] for one in fields],
            shard_ids=[piece.shard_id for piece, _ in rows],
            bucket=bucket,
            columns=columns,
            is_padding_B=torch.tensor(is_padding),
            num_unreadable=sum(row is None for row in found),
            epoch=epoch,
            number=number,
        )

    def _latents(self, bucket: str, rows: list[_Row], parts: Sequence[tuple[object, ...]]) -> Tensor:
        shape, dtype = self._catalog.latent_shape(bucket), self._catalog.dtype
        means = np.stack([piece.mean.of(row) for piece, row in rows])
        reading = self._reading
        if reading.sample == "mean" and reading.latents == "raw" and reading.dtype == dtype:
            return torch.from_numpy(means).view(dtype).reshape(len(rows), *shape)
        mean_BCTHW = as_float32(means, dtype, shape)
        if reading.sample == "mean":
            return finished_latents(mean_BCTHW, None, None, self._factors, reading)
        logvars = np.stack([piece.logvar.of(row) for piece, row in rows if piece.logvar is not None])
        noise_BCTHW = np.stack([noise(shape, *part) for part in parts])
        return finished_latents(mean_BCTHW, as_float32(logvars, dtype, shape), noise_BCTHW, self._factors, reading)

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
