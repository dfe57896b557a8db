"""Which windows are in which batch: pure functions of the dataset's row counts, (seed, epoch, batch size) and a step.

The batch at a step is global: `batch_size` lanes, of which rank r of R takes its R-th part. Ranks and DataLoader
workers therefore change who computes a batch and never what is in it.

How a bucket is shuffled, so that reads stay few and large:

    runs     the rows of one bucket in one shard, which lie side by side
    blocks   runs cut to the size of a read, in random order over all shards: a sequence of all rows
    lanes    that sequence cut into batch_size parts of STREAMS spans: span s of part i is the lane that fills place i
             of batch s and of every STREAMS-th after it
    pieces   what a lane shares with a block: one read, whose rows come in random order over as many batches

So a row is read by the one rank that owns its lane, and by one worker of that rank if the number of workers divides
STREAMS. The rows of a batch come from as many places, spread evenly over the whole sequence.

A dataset no larger than the buffer is read by the block instead: lanes are then shorter than blocks, and many would
each read their part of the same one. Ranks still share it out; the workers of a rank read the same blocks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np

Tail = Literal["drop", "pad"]
STREAMS = 8
ORDER_VERSION = 2
"""Of all that is computed here: it changes if the same settings would give other batches."""
READ_BYTES = (256 << 10, 8 << 20)
"""Least and most bytes of a block."""
FEW_READS = 4
"""Of each bucket of a dataset that fits into the buffer, if reads of READ_BYTES are enough for that."""
ANY_EPOCH = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class BucketRows:
    """The runs of one bucket: rows first ... first + rows - 1 of each shard that has some, in shard order."""

    name: str
    row_bytes: int
    """Of the numbers of one row, for the size of reads."""
    shard: np.ndarray
    """int64 (runs,): number of the shard in the manifest."""
    first: np.ndarray
    rows: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.rows.sum())

    @property
    def nbytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderSettings:
    """What decides the order of a dataset's batches. ValueError for what makes no order."""

    seed: int
    batch_size: int
    """Rows of a global batch, over all ranks."""
    shuffle: bool = True
    tail: Tail = "drop"
    buffer_bytes: int = 1 << 30
    """Of the pieces that all ranks together hold at a time."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "buffer_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.tail not in ("drop", "pad"):
            raise ValueError(f"tail: expected 'drop' or 'pad', got {self.tail!r}")

    def fits(self, total_bytes: int) -> bool:
        """Whether a dataset of so many bytes is read by the block, and held."""
        return total_bytes <= self.buffer_bytes

    def block_rows(self, bucket: BucketRows, total_bytes: int) -> int:
        """Rows of a block of a bucket in a dataset of `total_bytes`.

        So few that all lanes' pieces together stay within the bucket's part of buffer_bytes, which is its part of the
        dataset. Of a dataset that fits, so many that a few reads have it all.
        """
        least, most = READ_BYTES
        if self.fits(total_bytes):
            wanted = bucket.nbytes // FEW_READS
        else:
            wanted = self.buffer_bytes * bucket.nbytes // total_bytes // (STREAMS * self.batch_size)
        return max(1, min(most, max(least, wanted)) // bucket.row_bytes)


class Piece(NamedTuple):
    """Rows of one shard and one bucket that are read at once."""

    epoch: int
    """ANY_EPOCH for a whole block of a dataset that fits into the buffer: every epoch has it."""
    bucket: int
    shard: int
    first: int
    stop: int


_NOWHERE = Piece(-1, -1, -1, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One rank's rows of a global batch, in the order of its lanes."""

    bucket: int
    stream: int | None
    """None for batches that are not made of lanes: all of their pieces are finished."""
    pieces: tuple[Piece, ...]
    """Of each row; a piece may be there several times."""
    rows: tuple[int, ...]
    """Numbers of the rows in their shards."""
    is_padding: tuple[bool, ...]
    """Whether a row only fills up the tail batch of its bucket and is there as itself, too."""
    finished: tuple[Piece, ...]
    """Pieces that no later batch needs; never one of ANY_EPOCH."""


def seed_of(*parts: object) -> int:
    """128 bits that depend on the parts alone."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=16).digest(), "little")


def random_bits(count: int, *parts: object) -> np.ndarray:
    """uint64 (count,) that depend on the parts alone: Philox, whose stream numpy promises not to change."""
    return np.random.Philox(key=seed_of(*parts)).random_raw(count)


def random_order(count: int, *parts: object) -> np.ndarray:
    """A permutation of range(count), a function of the parts alone."""
    return np.argsort(random_bits(count, *parts), kind="stable")


def shuffled_keys(positions: np.ndarray, *parts: object) -> np.ndarray:
    """uint64 sort keys, each a function of its position and the parts alone: the finalizer of SplitMix64.

    For many short permutations at once, where a generator for each would cost more than the permutation.
    """
    bits = positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed_of(*parts) & (1 << 64) - 1)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return bits ^ (bits >> np.uint64(31))


def num_batches(rows: int, settings: OrderSettings) -> int:
    """Batches that a bucket of so many rows gives in an epoch."""
    full, rest = divmod(rows, settings.batch_size)
    return full + (1 if rest and settings.tail == "pad" else 0)


class _Blocks:
    """The rows of a bucket as a sequence, in the order of an epoch's blocks."""

    def __init__(
        self, bucket: BucketRows, number: int, settings: OrderSettings, epoch: int, total_bytes: int
    ) -> None:
        counts = -(-bucket.rows // settings.block_rows(bucket, total_bytes))  # blocks of each run, of nearly one size
        run = np.repeat(np.arange(len(bucket.rows)), counts)
        index = np.arange(len(run)) - np.repeat(np.cumsum(counts) - counts, counts)
        starts = index * bucket.rows[run] // counts[run]
        stops = (index + 1) * bucket.rows[run] // counts[run]
        order = np.arange(len(run))
        if settings.shuffle:
            order = random_order(len(run), "blocks", settings.seed, epoch, bucket.name)
        self.shard = bucket.shard[run][order]
        self.first = (bucket.first[run] + starts)[order]
        self.stop = np.cumsum((stops - starts)[order])
        self.start = self.stop - (stops - starts)[order]
        self._number, self._epoch = number, epoch
        self._whole = settings.fits(total_bytes)

    def pieces(self, block: np.ndarray, start: np.ndarray, stop: np.ndarray) -> list[Piece]:
        """What to read for the rows at the positions [start, stop) of the sequence, which are in these blocks."""
        epoch = self._epoch
        if self._whole:
            start, stop, epoch = self.start[block], self.stop[block], ANY_EPOCH
        offset = self.first[block] - self.start[block]
        columns = (self.shard[block].tolist(), (start + offset).tolist(), (stop + offset).tolist())
        return [Piece(epoch, self._number, *one) for one in zip(*columns, strict=True)]


class _Cursor:
    """Where some lanes of a stream are: from one batch to the next, most of them stay in their pieces."""

    __slots__ = ("ordinal", "pieces", "rows", "starts", "stops")

    def __init__(self, lanes: int) -> None:
        self.ordinal = 0
        self.pieces = [_NOWHERE] * lanes
        self.rows: list[list[int]] = [[]] * lanes
        """Of each lane's piece, in the order in which they come."""
        self.starts, self.stops = [0] * lanes, [0] * lanes
        """The batches of the stream that have a row of the piece."""


@dataclass(slots=True)
class EpochPlan:
    """The batches of one epoch. Memory is some bytes per batch and per block; the rest is computed as it is asked."""

    buckets: Sequence[BucketRows]
    settings: OrderSettings
    epoch: int
    _bucket_of: np.ndarray = field(init=False)
    _ordinal: np.ndarray = field(init=False)
    """Of a batch among those of its bucket and stream; -1 for the bucket's tail batch."""
    _full: np.ndarray = field(init=False)
    """int64 (buckets, streams): full batches."""
    _blocks: dict[int, _Blocks] = field(init=False, default_factory=dict)
    _cursors: dict[tuple[int, int, int, int], _Cursor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        settings, size = self.settings, self.settings.batch_size
        counts = [num_batches(bucket.num_rows, settings) for bucket in self.buckets]
        labels = np.repeat(np.arange(len(self.buckets)), counts)
        if settings.shuffle:
            labels = labels[random_order(len(labels), "buckets", settings.seed, self.epoch)]
        self._bucket_of, self._ordinal = labels, np.full(len(labels), -1, np.int64)
        streams = STREAMS if settings.shuffle else 1
        self._full = np.zeros((len(self.buckets), streams), np.int64)
        for number, bucket in enumerate(self.buckets):
            steps = np.flatnonzero(labels == number)[: bucket.num_rows // size]  # the tail batch is the last
            stream = steps % streams
            for one in range(streams):
                mine = steps[stream == one]
                self._ordinal[mine] = np.arange(len(mine))
                self._full[number, one] = len(mine)

    @property
    def num_batches(self) -> int:
        return len(self._bucket_of)

    def bucket_of(self, step: int) -> int:
        """Number of the bucket that a batch is of."""
        return int(self._bucket_of[step])

    def share(self, step: int, lanes: range) -> Share:
        """The rows at some places of the batch at a step of the epoch, 0 <= step < num_batches."""
        number = self.bucket_of(step)
        ordinal = int(self._ordinal[step])
        if ordinal < 0:
            return self._tail_share(number, lanes)
        if not self.settings.shuffle:
            start = ordinal * self.settings.batch_size
            return self._share_in_order(number, [start + lane for lane in lanes], [False] * len(lanes))
        return self._lane_share(number, step % STREAMS, ordinal, lanes)

    def _blocks_of(self, number: int) -> _Blocks:
        if number not in self._blocks:
            total_bytes = sum(bucket.nbytes for bucket in self.buckets)
            self._blocks[number] = _Blocks(self.buckets[number], number, self.settings, self.epoch, total_bytes)
        return self._blocks[number]

    def _lane_share(self, number: int, stream: int, ordinal: int, lanes: range) -> Share:
        key = (number, stream, lanes.start, lanes.stop)
        cursor = self._cursors.get(key)
        if cursor is None or ordinal < cursor.ordinal:
            cursor = self._cursors[key] = _Cursor(len(lanes))
        stale = [at for at, stop in enumerate(cursor.stops) if stop <= ordinal]
        if stale:
            self._advance(cursor, stale, number, stream, ordinal, lanes)
        cursor.ordinal = ordinal
        ending = [at for at, stop in enumerate(cursor.stops) if stop == ordinal + 1]
        return Share(
            bucket=number,
            stream=stream,
            pieces=tuple(cursor.pieces),
            rows=tuple([rows[ordinal - start] for rows, start in zip(cursor.rows, cursor.starts, strict=True)]),
            is_padding=(False,) * len(lanes),
            finished=tuple([cursor.pieces[at] for at in ending if cursor.pieces[at].epoch != ANY_EPOCH]),
        )

    def _advance(
        self, cursor: _Cursor, stale: list[int], number: int, stream: int, ordinal: int, lanes: range
    ) -> None:
        """Put some of the cursor's lanes on the pieces that they are in at a batch."""
        blocks, length = self._blocks_of(number), int(self._full[number, stream])
        of_place, before = int(self._full[number].sum()), int(self._full[number, :stream].sum())
        starts = (lanes.start + np.asarray(stale)) * of_place + before
        block = np.searchsorted(blocks.stop, starts + ordinal, side="right")
        lows = np.maximum(starts, blocks.start[block])
        highs = np.minimum(starts + length, blocks.stop[block])
        rows = self._shuffled_rows(number, block, lows, highs)
        pieces = blocks.pieces(block, lows, highs)
        columns = (stale, pieces, rows, (lows - starts).tolist(), (highs - starts).tolist())
        for lane, piece, own_rows, low, high in zip(*columns, strict=True):
            cursor.pieces[lane], cursor.rows[lane] = piece, own_rows
            cursor.starts[lane], cursor.stops[lane] = low, high

    def _shuffled_rows(self, number: int, block: np.ndarray, lows: np.ndarray, highs: np.ndarray) -> list[list[int]]:
        """Of each span of positions, all of which lie in its block, the rows in the order in which they come."""
        blocks, counts = self._blocks_of(number), highs - lows
        ends = np.cumsum(counts)
        span = np.repeat(np.arange(len(counts)), counts)
        positions = np.arange(ends[-1]) + (lows - ends + counts)[span]
        keys = shuffled_keys(positions, "rows", self.settings.seed, self.epoch, self.buckets[number].name)
        rows = (positions + (blocks.first[block] - blocks.start[block])[span])[np.lexsort((keys, span))].tolist()
        return [rows[end - count : end] for end, count in zip(ends.tolist(), counts.tolist(), strict=True)]

    def _tail_share(self, number: int, lanes: range) -> Share:
        """What is left of a bucket, and then the same rows again until the batch is full."""
        total = self.buckets[number].num_rows
        rest = total % self.settings.batch_size
        positions = [total - rest + lane % rest for lane in lanes]
        return self._share_in_order(number, positions, [lane >= rest for lane in lanes])

    def _share_in_order(self, number: int, positions: Sequence[int], is_padding: Sequence[bool]) -> Share:
        """Rows at given positions of the sequence; what they share with a block is one piece."""
        blocks, at = self._blocks_of(number), np.asarray(positions)
        block = np.searchsorted(blocks.stop, at, side="right")
        distinct, of = np.unique(block, return_inverse=True)
        lows = np.array([at[of == one].min() for one in range(len(distinct))])
        highs = np.array([at[of == one].max() + 1 for one in range(len(distinct))])
        pieces = blocks.pieces(distinct, lows, highs)
        return Share(
            bucket=number,
            stream=None,
            pieces=tuple([pieces[one] for one in of.tolist()]),
            rows=tuple((at + blocks.first[block] - blocks.start[block]).tolist()),
            is_padding=tuple(is_padding),
            finished=tuple(piece for piece in pieces if piece.epoch != ANY_EPOCH),
        )


@dataclass(frozen=True)
class BatchPlan:
    """All epochs. A batch's number counts from the first one of epoch 0; every epoch has as many."""

    buckets: tuple[BucketRows, ...]
    settings: OrderSettings

    @cached_property
    def batches_per_epoch(self) -> int:
        return sum(num_batches(bucket.num_rows, self.settings) for bucket in self.buckets)

    @property
    def too_small(self) -> dict[str, int]:
        """Rows of the buckets that never give a batch: they have less than one, and tails are dropped."""
        return {
            bucket.name: bucket.num_rows for bucket in self.buckets if not num_batches(bucket.num_rows, self.settings)
        }

    @property
    def dropped_per_epoch(self) -> dict[str, int]:
        """Rows of each bucket that an epoch leaves out: with shuffling, others in every epoch."""
        size = self.settings.batch_size
        rest = {bucket.name: bucket.num_rows % size for bucket in self.buckets}
        return {name: rows for name, rows in rest.items() if rows and self.settings.tail == "drop"}

    def position(self, number: int) -> tuple[int, int]:
        """(epoch, step) of a batch."""
        if number < 0:
            raise ValueError(f"batch: expected at least 0, got {number}")
        return divmod(number, self.batches_per_epoch)

    def epoch(self, epoch: int) -> EpochPlan:
        return EpochPlan(self.buckets, self.settings, epoch)

    def lanes(self, rank: int, world_size: int) -> range:
        """The places of a rank in every batch. ValueError if they cannot be shared out evenly."""
        size = self.settings.batch_size
        if world_size < 1 or not 0 <= rank < world_size:
            raise ValueError(f"rank: expected 0 <= rank < world_size, got rank {rank} of {world_size}")
        if size % world_size:
            raise ValueError(
                f"batch_size: expected a multiple of world_size={world_size}, since it counts the rows of all ranks "
                f"together, got {size}"
            )
        return range(rank * size // world_size, (rank + 1) * size // world_size)
