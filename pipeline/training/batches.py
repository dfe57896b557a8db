"""The batches of a run: each step's source, drawn by weight, and this worker's share of its samples.

Sample k of a step comes from lane k modulo the number of lanes, and goes to worker k modulo the number of workers. So
the samples of a step are the same for any number of workers that divides the number of lanes, and each worker reads
the tars of its own lanes only.
"""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from pipeline.errors import ClipError, ConfigError, SourceError
from pipeline.prefetch import close_clip, prefetched
from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources import SourceDigest, plan_source, read_shard
from pipeline.training.draws import MAX_SAMPLE_BYTES, READ_AHEAD, Draw, LanePlan, Position, draws
from pipeline.training.samples import SampleDecoder, draw_cut
from pipeline.training.settings import DataSettings, SampleSource

Positions = dict[str, dict[int, Position]]
"""Source -> lane -> where it goes on."""
FRUITLESS_EPOCHS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A worker's share of one step."""

    step: int
    source: str
    frames_NTHWC: np.ndarray
    """uint8 RGB."""
    numbers: tuple[int, ...]
    """Each sample's number among the samples of the step, over all workers."""
    keys: tuple[str, ...]
    positions: dict[int, Position]
    """Lane -> where it goes on after this batch; this worker's lanes of `source`."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Samples of those lanes that could not be used on the way, by rejection class."""


def to_video(frames_NTHWC: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 RGB -> video_BCTHW in [-1, 1], float32."""
    frames = torch.from_numpy(frames_NTHWC).to(device)
    return frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def source_of_step(sources: Sequence[SampleSource], seed: int, step: int) -> SampleSource:
    """The source that a step draws from, by weight: a function of (seed, step)."""
    weights = [source.weight for source in sources]
    return random.Random(f"{seed}/mix/{step}").choices(sources, weights)[0]


def plan_shards(source: SampleSource) -> tuple[VideoShard, ...]:
    """The source's tars. ConfigError and SourceError name the source."""
    try:
        return plan_source(source.tars()).shards
    except (ConfigError, SourceError) as error:
        raise type(error)(f"data.sources.{source.name}: {error}") from error


@dataclass(frozen=True, slots=True)
class _Used:
    """A sample that could be used."""

    frames_THWC: np.ndarray
    key: str
    following: Position
    skipped: Counter[str]


class Loader:
    """Batches from `start` to `stop`, made ahead in a thread. Close it, or use it as a context manager."""

    def __init__(
        self,
        data: DataSettings,
        shards: Mapping[str, tuple[VideoShard, ...]],
        *,
        seed: int,
        start: int,
        stop: int,
        positions: Positions,
        rank: int = 0,
        num_workers: int = 1,
    ) -> None:
        """`shards` are each source's by name; `positions` a checkpoint's, empty at the start. ConfigError unless the
        workers divide the lanes."""
        if data.lanes % num_workers:
            raise ConfigError(f"data.lanes: expected a multiple of the {num_workers} workers, got {data.lanes}")
        self._data, self._seed = data, seed
        self._share = range(rank, data.lanes, num_workers)
        self._decoder = SampleDecoder(data.decode_children, data.sources)
        self._executor = ThreadPoolExecutor(data.decode_children + 1, thread_name_prefix="decode-sample")
        self._lanes = {
            (source.name, lane): self._lane(source, shards[source.name], lane, positions)
            for source in data.sources
            for lane in self._share
        }
        self._ahead = ExitStack()
        made = (self._batch(step) for step in range(start, stop))
        self._batches = self._ahead.enter_context(prefetched(made, depth=data.prefetch_batches))

    def __iter__(self) -> Iterator[Batch]:
        """Once. Errors of the sources are raised where their batch would have come."""
        return self._batches

    def _batch(self, step: int) -> Batch:
        source = source_of_step(self._data.sources, self._seed, step)
        numbers = tuple(k for k in range(source.batch_size) if k % self._data.lanes in self._share)
        used = [next(self._lanes[source.name, k % self._data.lanes]) for k in numbers]
        return Batch(
            step=step,
            source=source.name,
            frames_NTHWC=np.stack([one.frames_THWC for one in used]),
            numbers=numbers,
            keys=tuple(one.key for one in used),
            positions={k % self._data.lanes: one.following for k, one in zip(numbers, used, strict=True)},
            skipped=sum((one.skipped for one in used), Counter()),
        )

    def _lane(
        self, source: SampleSource, shards: tuple[VideoShard, ...], lane: int, positions: Positions
    ) -> Iterator[_Used]:
        plan = LanePlan(
            source_name=source.name,
            source=source.tars(),
            shards=shards,
            lane=lane,
            num_lanes=self._data.lanes,
            seed=self._seed,
            buffer=self._data.shuffle_buffer,
        )
        start = positions.get(source.name, {}).get(lane, Position())
        ahead = -(-(self._data.decode_children + 1) // len(self._share))
        return self._usable(plan, source, draws(plan, start), ahead)

    def _usable(self, plan: LanePlan, source: SampleSource, drawn: Iterator[Draw], ahead: int) -> Iterator[_Used]:
        """Decoded samples in the lane's order, `ahead` of them under way. SourceError after whole epochs of none."""
        waiting: deque[tuple[Draw, Future[np.ndarray | str]]] = deque()
        skipped: Counter[str] = Counter()
        last_good: int | None = None
        with closing(drawn):  # type: ignore[type-var] - a generator
            while True:
                while len(waiting) < ahead:
                    draw = next(drawn)
                    waiting.append((draw, self._executor.submit(self._decode, plan, source, draw)))
                draw, future = waiting.popleft()
                result = future.result()
                last_good = draw.epoch if last_good is None else last_good
                if isinstance(result, str):
                    skipped[result] += 1
                    if draw.epoch - last_good >= FRUITLESS_EPOCHS:
                        found = ", ".join(f"{name} {count}" for name, count in skipped.most_common())
                        raise SourceError(f"data.sources.{source.name}: no sample could be used: {found}")
                    continue
                last_good = draw.epoch
                yield _Used(result, draw.sample.key, draw.following, skipped)
                skipped = Counter()

    def _decode(self, plan: LanePlan, source: SampleSource, draw: Draw) -> np.ndarray | str:
        """The sample's pixels, or the class of its rejection."""
        if isinstance(draw.sample, Rejection):
            return draw.sample.error_class
        clip = draw.sample
        cut = draw_cut(source, f"{plan.seed}/{source.name}/{draw.epoch}/{clip.shard_id}/{clip.key}")
        try:
            return self._decoder.decode(clip, source, cut)
        except ClipError as error:
            return error.error_class.value

    def close(self) -> None:
        """End the thread and the decode children."""
        self._ahead.close()
        self._executor.shutdown(wait=True, cancel_futures=True)
        self._decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def held_out_frames(
    source: SampleSource, count: int, *, rank: int = 0, num_workers: int = 1
) -> list[tuple[str, np.ndarray]]:
    """(key, uint8 THWC) of this worker's share of the first `count` samples that the reader gives, centre cropped.

    Those that cannot be decoded are left out. SourceError if that leaves none of all workers' samples.
    """
    found: list[tuple[str, np.ndarray]] = []
    centred = source.model_copy(update={"crop": "center"})
    with SampleDecoder(1, (source,)) as decoder:
        for number, clip in enumerate(islice(_clips(source), count)):
            if number % num_workers != rank:
                close_clip(clip)
                continue
            try:
                found.append((clip.key, decoder.decode(clip, centred, draw_cut(centred, ""))))
            except ClipError:
                continue
    return found


def _clips(source: SampleSource) -> Iterator[Clip]:
    tars = source.tars()
    for shard in plan_shards(source):
        reader = read_shard(shard, tars, max_clip_bytes=MAX_SAMPLE_BYTES, digest=SourceDigest())
        with prefetched(reader, depth=READ_AHEAD) as samples:
            yield from (sample for sample in samples if isinstance(sample, Clip))


def merged(into: Positions, batches: Sequence[Any]) -> None:
    """Note where the lanes of these batches (all workers' of a step) go on: (source, positions) pairs."""
    for source, positions in batches:
        into.setdefault(source, {}).update(positions)
