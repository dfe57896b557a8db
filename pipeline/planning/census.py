"""How many samples a source has, without decoding and, where sidecars say it, without reading a tar.

A table knows its rows. A tar's video2dataset sidecar says its number in the footer; tars without one are counted by
their headers, a few of them, and the others are taken to hold as many samples per byte.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from pipeline.records import VideoShard
from pipeline.sources import SourceSpec, WebDatasetSource
from pipeline.sources.sidecar import sidecar_num_rows
from pipeline.sources.tar import count_tar_keys

SIDECARS_ASKED = 2000
HEADERS_READ = 8
LOOKUPS_AT_ONCE = 32


@dataclass(frozen=True, slots=True)
class Census:
    """Samples per shard, in the order of the shards."""

    samples: np.ndarray
    num_counted: int
    """Shards whose number is known; of the others it is inferred from their bytes."""
    relative_error: float
    """Standard error of the inferred ones together, as a share of them."""

    @property
    def total(self) -> float:
        return float(self.samples.sum())

    @property
    def total_error(self) -> float:
        """Standard error of the total, as a share of it."""
        inferred = 1.0 - self.num_counted / max(1, len(self.samples))
        return inferred * self.relative_error


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of `count` positions (all if there are fewer), in the middle of equal parts."""
    wanted = min(count, wanted)
    return [int((number + 0.5) * count / wanted) for number in range(wanted)]


def take_census(shards: Sequence[VideoShard], spec: SourceSpec) -> Census:
    """Samples of every shard. StorageError if a tar cannot be read."""
    if not isinstance(spec, WebDatasetSource):
        rows = [stop - start for start, stop in (shard.rows or (0, 0) for shard in shards)]
        return Census(np.array(rows, dtype=float), len(rows), 0.0)
    asked = spread(len(shards), SIDECARS_ASKED)
    with ThreadPoolExecutor(LOOKUPS_AT_ONCE, thread_name_prefix="census") as pool:
        said = pool.map(lambda number: sidecar_num_rows(shards[number].url, spec.options), asked)
        known = {number: rows for number, rows in zip(asked, said, strict=True) if rows is not None}
        silent = [number for number in asked if number not in known]
        read = [silent[position] for position in spread(len(silent), HEADERS_READ)]
        counted = pool.map(lambda number: count_tar_keys(shards[number], spec), read)
        known |= dict(zip(read, counted, strict=True))
    return _inferred(shards, known)


def _inferred(shards: Sequence[VideoShard], known: dict[int, int]) -> Census:
    """Shards that were not counted hold as many samples per byte as those that were."""
    sizes = np.array([float(shard.size or 0) for shard in shards])
    numbers = np.array(sorted(known))
    counts = np.array([float(known[number]) for number in numbers])
    bytes_counted = sizes[numbers].sum()
    rate = counts.sum() / bytes_counted if bytes_counted else 0.0
    samples = sizes * rate
    samples[numbers] = counts
    # the usual error of a ratio of two sums; one tar alone says nothing of how tars differ
    degrees = len(numbers) - 1
    residuals = counts - rate * sizes[numbers]
    error = float(np.sqrt(len(numbers) / degrees * (residuals**2).sum()) / max(1.0, counts.sum())) if degrees else 0.5
    return Census(samples, len(numbers), error)
