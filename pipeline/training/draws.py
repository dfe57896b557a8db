"""Which sample comes next: an endless, shuffled stream over tars that is a function of the seed.

A source's tars are dealt to lanes, each an independent stream that is read front to back, a tar at a time. Samples
are drawn from a buffer that never outlives its tar, so a position is three numbers, and going back to one costs at
most one tar read again per lane.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.errors import SourceError
from pipeline.prefetch import close_clip, prefetched
from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources import SourceDigest, WebDatasetSource, read_shard

READ_AHEAD = 4
MAX_SAMPLE_BYTES = 2 << 30


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """Where a lane goes on: the next draw of a tar, of an epoch."""

    epoch: int = 0
    tar: int = 0
    """Its place among the lane's tars of that epoch."""
    draw: int = 0

    @classmethod
    def from_list(cls, values: Sequence[int]) -> Position:
        """ValueError unless there are three."""
        epoch, tar, draw = values
        return cls(epoch, tar, draw)

    def to_list(self) -> list[int]:
        return [self.epoch, self.tar, self.draw]


@dataclass(frozen=True, slots=True)
class Draw:
    """A sample on its turn: bytes that the taker closes, or the reason why there are none."""

    sample: Clip | Rejection
    epoch: int
    following: Position
    """Where the lane goes on after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanePlan:
    """One lane of a source."""

    source_name: str
    source: WebDatasetSource
    shards: tuple[VideoShard, ...]
    lane: int
    num_lanes: int
    seed: int
    buffer: int

    def tars(self, epoch: int) -> list[VideoShard]:
        """The lane's tars in this epoch's order. With fewer tars than lanes every lane reads all, for its share of
        their samples."""
        order = list(self.shards)
        random.Random(f"{self.seed}/{self.source_name}/{epoch}").shuffle(order)
        return order if self.shares_tars else order[self.lane :: self.num_lanes]

    @property
    def shares_tars(self) -> bool:
        return len(self.shards) < self.num_lanes


def draws(plan: LanePlan, start: Position) -> Iterator[Draw]:
    """The lane's draws from `start` on, without end: SourceError and StorageError of the reader pass."""
    epoch, tar, skip = start.epoch, start.tar, start.draw
    while True:
        shards = plan.tars(epoch)
        empty = tar == skip == 0
        for number in range(tar, len(shards)):
            for draw in _of_tar(plan, shards[number], epoch, number, skip, last=number + 1 == len(shards)):
                empty = False
                yield draw
            skip = 0
        if empty:
            raise SourceError(
                f"data.sources.{plan.source_name}: no sample in its {len(shards)} tars (lane {plan.lane})"
            )
        epoch, tar = epoch + 1, 0


def _of_tar(plan: LanePlan, shard: VideoShard, epoch: int, number: int, skip: int, *, last: bool) -> Iterator[Draw]:
    """All draws of one tar but the first `skip`."""
    after_tar = Position(epoch + 1) if last else Position(epoch, number + 1)
    reader = read_shard(shard, plan.source, max_clip_bytes=MAX_SAMPLE_BYTES, digest=SourceDigest())
    rng = random.Random(f"{plan.seed}/{plan.source_name}/{epoch}/{shard.id}/{plan.lane}")
    with prefetched(reader, depth=READ_AHEAD) as samples:
        mine = (  # what goes by unused is closed when it is collected
            sample
            for ordinal, sample in enumerate(samples)
            if not plan.shares_tars or ordinal % plan.num_lanes == plan.lane
        )
        for drawn, (sample, is_last) in enumerate(_with_end(_shuffled(mine, plan.buffer, rng)), start=1):
            if drawn <= skip:
                close_clip(sample)
                continue
            yield Draw(sample, epoch, after_tar if is_last else Position(epoch, number, drawn))


def _shuffled(samples: Iterator[Clip | Rejection], size: int, rng: random.Random) -> Iterator[Clip | Rejection]:
    """Every sample once, each from a buffer of `size` at random."""
    held: list[Clip | Rejection] = []
    for sample in samples:
        held.append(sample)
        if len(held) >= size:
            yield held.pop(rng.randrange(len(held)))
    rng.shuffle(held)
    while held:
        yield held.pop()


def _with_end(samples: Iterator[Clip | Rejection]) -> Iterator[tuple[Clip | Rejection, bool]]:
    """Each with whether it is the last."""
    waiting: Clip | Rejection | None = None
    for sample in samples:
        if waiting is not None:
            yield waiting, False
        waiting = sample
    if waiting is not None:
        yield waiting, True
