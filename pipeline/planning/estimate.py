"""From a sample to the whole run: totals, times and bytes, each with an interval.

Totals are ratios: so much per sample, times the samples of the source. The interval is the 5th to the 95th
percentile of a bootstrap over the sample's groups (and over the repeated batches), so it holds what the sample's
chance does to the figures. It does not hold what differs between this machine and another.

An encoder's time for a shard is the longest of three: its batches; the decoding, shared out over its decode
processes; and, where encoder and decoders share cores, all of their processor time over those cores.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.documents import Document
from pipeline.planning.census import Census
from pipeline.planning.sample import SampleMeasure, TileShape
from pipeline.records import VideoShard

REPLICATES = 200
LOW, HIGH = 5.0, 95.0
GROUPS_FOR_AN_INTERVAL = 3
SLOW_SHARD_SECONDS = 600.0
SHOWN_SHARDS = 20


class Estimate(Document):
    """A figure and the interval it is in nine times out of ten."""

    low: float
    value: float
    high: float

    def times(self, factor: float) -> Estimate:
        return Estimate(low=self.low * factor, value=self.value * factor, high=self.high * factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """What an encoder of the run has."""

    decode_children: int
    encode_threads: int
    """Cores its batches keep busy; 0 with a GPU."""
    cores: float
    """That encoder and decoders share."""


class WallTime(Document):
    """The run on so many encoders, start-up not counted."""

    encoders: int
    seconds: Estimate
    encoder_hours: Estimate
    price: Estimate | None


class EncodePlan(Document):
    """plan.json."""

    format_version: int = 1
    fingerprint: str
    device: str
    sampled_groups: int
    sampled_samples: int
    sample_seconds: float
    shards: int
    samples: Estimate
    totals: dict[str, Estimate]
    """Of the whole source: clips, windows, frames, video seconds, payload bytes."""
    buckets: dict[str, Estimate]
    """Windows per bucket."""
    rejections: dict[str, Estimate]
    """Per class seen in the sample."""
    unseen_class_share: float
    """A class that the sample did not show has at most this share of the samples, nineteen times out of twenty."""
    storage_bytes: dict[str, Estimate]
    """Payload by storage dtype and choice of moments."""
    encode_seconds: Estimate
    """All batches of all shards, on one encoder like this one."""
    decode_core_seconds: Estimate
    encoder_frames_per_second: Estimate
    """Stored frames per second of batches."""
    decode_frames_per_second: Estimate
    """Decoded frames per second of one core."""
    decode_cores_per_encoder: Estimate
    """That keep both busy."""
    decode_children: int
    """Per encoder, as assumed by the times below."""
    work_seconds: Estimate
    """Of all shards on one such encoder, waiting for its decoders included."""
    walls: tuple[WallTime, ...]
    longest_shard_seconds: float
    slow_shards: tuple[tuple[str, float], ...]
    """Shards over ten minutes, slowest first, at most `SHOWN_SHARDS`."""
    num_slow_shards: int


def make_plan(
    shards: Sequence[VideoShard],
    census: Census,
    sample: SampleMeasure,
    shape: EncoderShape,
    *,
    encoders: Sequence[int],
    price_per_hour: float | None = None,
) -> EncodePlan:
    """The estimate for all `shards`; `encoders` are the sizes of the cluster to give times for."""
    draws = _Draws(census, sample, shape)
    per_shard = draws.shard_seconds()
    best = per_shard * (draws.work.value / per_shard.sum()) if per_shard.sum() else per_shard
    slow = [(shards[i].id, round(float(best[i]), 1)) for i in np.argsort(-best) if best[i] > SLOW_SHARD_SECONDS]
    names = ("clips", "windows", "frames", "frames decoded", "video seconds")
    sampled = int(draws.best_sum("samples"))
    return EncodePlan(
        fingerprint=sample.fingerprint,
        device=sample.device,
        sampled_groups=len(sample.groups),
        sampled_samples=sampled,
        sample_seconds=round(sample.seconds, 1),
        shards=len(shards),
        samples=draws.of(lambda one: one.samples),
        totals={name: draws.total(name) for name in names} | {"payload bytes": draws.stored("payload bytes")},
        buckets=draws.prefixed("bucket "),
        rejections=draws.prefixed("rejected "),
        unseen_class_share=min(1.0, 3.0 / max(1, sampled)),
        storage_bytes={name: draws.stored(name) for name in draws.names if "mean" in name},
        encode_seconds=draws.of(lambda one: one.encode_seconds),
        decode_core_seconds=draws.total("decode seconds"),
        encoder_frames_per_second=draws.of(lambda one: _ratio(one.total("frames"), one.encode_seconds)),
        decode_frames_per_second=draws.of(
            lambda one: _ratio(one.total("frames decoded"), one.total("decode seconds"))
        ),
        decode_cores_per_encoder=draws.of(lambda one: _ratio(one.total("decode seconds"), one.encode_seconds)),
        decode_children=shape.decode_children,
        work_seconds=draws.work,
        walls=tuple(_wall(number, best, draws.work, price_per_hour) for number in encoders),
        longest_shard_seconds=round(float(best.max(initial=0.0)), 1),
        slow_shards=tuple(slow[:SHOWN_SHARDS]),
        num_slow_shards=len(slow),
    )


def makespan(seconds: np.ndarray, encoders: int) -> float:
    """How long so many encoders take that each fetch the next shard, in order, as they become free."""
    free = [0.0] * min(encoders, max(1, len(seconds)))
    for each in seconds:
        heapq.heappush(free, heapq.heappop(free) + float(each))
    return max(free)


def _wall(encoders: int, shard_seconds: np.ndarray, work: Estimate, price: float | None) -> WallTime:
    best = makespan(shard_seconds, encoders)
    relative = [bound / work.value if work.value else 1.0 for bound in (work.low, work.high)]
    seconds = Estimate(low=best * relative[0], value=best, high=best * relative[1])
    hours = seconds.times(encoders / 3600)
    return WallTime(
        encoders=encoders, seconds=seconds, encoder_hours=hours, price=None if price is None else hours.times(price)
    )


def _ratio(above: float, below: float) -> float:
    return above / below if below else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _One:
    """One draw of the bootstrap, carried to the whole source."""

    names: dict[str, int]
    per_sample: np.ndarray
    tiles_per_sample: np.ndarray
    samples: float
    num_shards: int
    batch_seconds: np.ndarray
    """Per tile shape."""
    batch_sizes: np.ndarray
    slowdown: float

    def total(self, name: str) -> float:
        return self.samples * float(self.per_sample[self.names[name]])

    def batches(self, samples_per_shard: np.ndarray) -> np.ndarray:
        """Expected seconds of batches per shard: the last batch of a shape is half full, if there is one at all."""
        tiles = np.outer(samples_per_shard, self.tiles_per_sample)
        present = 1.0 - np.exp(-tiles)
        batches = np.maximum(present, tiles / self.batch_sizes + 0.5 * present * (1.0 - 1.0 / self.batch_sizes))
        return self.slowdown * (batches @ self.batch_seconds)

    @property
    def encode_seconds(self) -> float:
        mean = np.array([self.samples / max(1, self.num_shards)])
        return self.num_shards * float(self.batches(mean)[0])


class _Draws:
    """The best estimate and the bootstrap's draws."""

    def __init__(self, census: Census, sample: SampleMeasure, shape: EncoderShape) -> None:
        self._census, self._sample, self._shape = census, sample, shape
        names = sorted({name for group in sample.groups for name in group.totals})
        self.names = {name: position for position, name in enumerate(names)}
        self._shapes: list[TileShape] = sorted(sample.batches)
        self._sums = np.array([[group.totals.get(name, 0.0) for name in names] for group in sample.groups])
        self._tiles = np.array([[group.tiles.get(one, 0) for one in self._shapes] for group in sample.groups])
        self._sizes = np.array([float(sample.batches[one].batch_size) for one in self._shapes])
        median = np.array([float(np.median(sample.batches[one].seconds)) for one in self._shapes])
        groups = len(sample.groups)
        self._best = self._draw(np.ones(groups), median, 0.0)
        rng = np.random.default_rng(0)
        self._draws = [
            self._draw(
                rng.multinomial(groups, np.full(groups, 1 / groups)).astype(float),
                np.array([float(rng.choice(sample.batches[one].seconds)) for one in self._shapes]),
                float(rng.normal()) * census.total_error,
            )
            for _ in range(REPLICATES)
        ]
        self.work = self.of(self._work)

    def _draw(self, weights: np.ndarray, batch_seconds: np.ndarray, census_error: float) -> _One:
        samples = max(1.0, float(weights @ self._sums[:, self.names["samples"]]))
        return _One(
            names=self.names,
            per_sample=weights @ self._sums / samples,
            tiles_per_sample=weights @ self._tiles / samples,
            samples=self._census.total * max(0.0, 1.0 + census_error),
            num_shards=len(self._census.samples),
            batch_seconds=batch_seconds,
            batch_sizes=self._sizes,
            slowdown=self._slowdown(weights, batch_seconds),
        )

    def _slowdown(self, weights: np.ndarray, batch_seconds: np.ndarray) -> float:
        """How much longer batches took beside decoding than alone; of groups with every shape warm."""
        warm = weights * np.array([group.warm for group in self._sample.groups], dtype=float)
        alone = np.ceil(self._tiles / self._sizes) @ batch_seconds if len(self._shapes) else np.zeros(len(weights))
        beside = np.array([group.encode_seconds for group in self._sample.groups])
        return float(warm @ beside / (warm @ alone)) if warm @ alone else 1.0

    def of(self, figure: Callable[[_One], float]) -> Estimate:
        """The figure of the best estimate, and its interval; half and double of it from too few groups."""
        value = figure(self._best)
        if len(self._sample.groups) < GROUPS_FOR_AN_INTERVAL:
            return Estimate(low=value / 2, value=value, high=value * 2)
        low, high = np.percentile([figure(one) for one in self._draws], [LOW, HIGH])
        return Estimate(low=min(value, float(low)), value=value, high=max(value, float(high)))

    def total(self, name: str) -> Estimate:
        return self.of(lambda one: one.total(name))

    def stored(self, name: str) -> Estimate:
        """Bytes of windows, and of what every shard has besides: a header and an end, and padding by chance."""
        windows, groups, shards = self.total(name), len(self._sample.groups), len(self._census.samples)
        empty, padding = (self.best_sum(what) / groups * shards for what in ("empty bytes", "padding bytes"))
        return Estimate(
            low=windows.low + empty,
            value=windows.value + empty + padding / 2,
            high=windows.high + empty + padding,
        )

    def prefixed(self, prefix: str) -> dict[str, Estimate]:
        return {name.removeprefix(prefix): self.total(name) for name in self.names if name.startswith(prefix)}

    def best_sum(self, name: str) -> float:
        return float(self._sums[:, self.names[name]].sum())

    def shard_seconds(self) -> np.ndarray:
        """Of the best estimate, per shard."""
        return self._encoder_seconds(self._best, self._census.samples)

    def _work(self, one: _One) -> float:
        mean = np.array([one.samples / max(1, one.num_shards)])
        return one.num_shards * float(self._encoder_seconds(one, mean)[0])

    def _encoder_seconds(self, one: _One, samples_per_shard: np.ndarray) -> np.ndarray:
        shape = self._shape
        encode = one.batches(samples_per_shard)
        decode = samples_per_shard * one.per_sample[self.names["decode seconds"]]
        limits = [encode, decode / shape.decode_children, (encode * shape.encode_threads + decode) / shape.cores]
        assert not any(math.isnan(float(limit.sum())) for limit in limits), "sums of measured seconds are numbers"
        return np.maximum.reduce(limits)
