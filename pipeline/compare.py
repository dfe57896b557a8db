"""What differs between two datasets: identity, windows, rows, rejections, numbers.

Shards of one name are read side by side in their stored order, a window of each in memory at a time; those with equal
bytes are not read at all. Windows that lie in other shards on the other side are matched by key afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache

from torch import Tensor

from pipeline.dataset import DatasetFolder, index_name, leaf_differences
from pipeline.documents import RunFile, ShardReceipt
from pipeline.formats import FORMATS, IndexRow, read_index
from pipeline.records import Latent, LatentRow

KEPT = 5
"""Examples of each kind that are kept with their names."""
NAMES = ("A", "B")
_INDICES_AT_ONCE = 8


@dataclass(slots=True)
class Counted:
    """How many, and the first of them."""

    number: int = 0
    first: list[str] = field(default_factory=list)

    def add(self, name: str) -> None:
        self.number += 1
        if len(self.first) < KEPT:
            self.first.append(name)


@dataclass(slots=True)
class NumberDifference:
    """Of the numbers of windows that both sides hold in one shape."""

    windows: int = 0
    equal: int = 0
    """Windows without any difference."""
    values: int = 0
    largest: float = 0.0
    """Absolute difference of two values; NaN counts as infinite."""
    squares: float = 0.0
    """Sum of squared differences."""
    reference_squares: float = 0.0
    """Sum of A's squared values."""
    worst: list[tuple[float, str]] = field(default_factory=list)
    """(largest difference, key) of the windows that differ most."""

    def add(self, key: str, one: Tensor, other: Tensor) -> None:
        """Two tensors of one shape, any float dtype."""
        difference = (one.double() - other.double()).abs().nan_to_num(nan=math.inf)
        largest = float(difference.max())
        self.windows += 1
        self.equal += largest == 0
        self.values += one.numel()
        self.largest = max(self.largest, largest)
        self.squares += float(difference.square().sum())
        self.reference_squares += float(one.double().square().sum())
        if largest > 0:
            self.worst = sorted([*self.worst, (largest, key)], reverse=True)[:KEPT]

    @property
    def rms(self) -> float:
        return math.sqrt(self.squares / self.values) if self.values else 0.0

    @property
    def relative_rms(self) -> float:
        """RMS of the differences over the RMS of A's values."""
        return math.sqrt(self.squares / self.reference_squares) if self.reference_squares else 0.0


@dataclass(slots=True)
class DatasetComparison:
    """A against B."""

    identity: list[str] = field(default_factory=list)
    """A line per setting that differs."""
    shards_equal: int = 0
    """Shards with the same bytes, whose windows were not read."""
    shards_read: int = 0
    windows_equal: int = 0
    """Windows of the shards with the same bytes."""
    only: tuple[Counted, Counted] = field(default_factory=lambda: (Counted(), Counted()))
    """Windows of A alone, of B alone."""
    other_rows: Counted = field(default_factory=Counted)
    """Windows with another caption, source, time, crop or shape; the first with the fields that differ."""
    rejections: tuple[Counted, Counted] = field(default_factory=lambda: (Counted(), Counted()))
    """Rejections, as "key: class", of A alone, of B alone."""
    numbers: NumberDifference = field(default_factory=NumberDifference)

    def same_data(self, tolerance: float = 0.0) -> bool:
        """Whether both hold the same windows, rows, rejections, and numbers within `tolerance` of each other. The
        identities may differ."""
        counted = (*self.only, *self.rejections, self.other_rows)
        return not any(one.number for one in counted) and self.numbers.largest <= tolerance


def compare_datasets(a: DatasetFolder, b: DatasetFolder) -> DatasetComparison:
    """All committed shards of both. DatasetError if something cannot be read."""
    found = DatasetComparison()
    runs = (a.run_file(), b.run_file())
    first, second = ({"format": run.format, **run.identity.model_dump(mode="json")} for run in runs)
    found.identity = list(leaf_differences("", first, second, names=NAMES))
    left: tuple[dict[str, str], dict[str, str]] = ({}, {})  # key -> shard of windows without a partner so far
    committed = (set(a.receipt_ids()), set(b.receipt_ids()))
    for shard_id in sorted(committed[0] | committed[1]):
        one, other = (
            folder.receipt(shard_id) if shard_id in ids else None
            for folder, ids in zip((a, b), committed, strict=True)
        )
        _compare_rejections(one, other, found)
        if one is not None and other is not None and one.payload.sha256 == other.payload.sha256:
            found.shards_equal += 1
            found.windows_equal += one.counts.windows_stored
            continue
        found.shards_read += 1
        with ExitStack() as stack:
            streams = (_latents(stack, a, runs[0], one), _latents(stack, b, runs[1], other))
            for pair in side_by_side(*streams):
                _compare_windows(pair, shard_id, left, found)
    _match_left((a, b), runs, left, found)
    return found


def side_by_side(
    one: Iterator[Latent], other: Iterator[Latent]
) -> Iterator[tuple[Latent, Latent] | tuple[Latent, None] | tuple[None, Latent]]:
    """Two shards in stored order joined by bucket and key."""
    first, second = next(one, None), next(other, None)
    while first is not None or second is not None:
        if second is None or (first is not None and first.row.sort_key < second.row.sort_key):
            assert first is not None
            yield first, None
            first = next(one, None)
        elif first is None or second.row.sort_key < first.row.sort_key:
            yield None, second
            second = next(other, None)
        else:
            yield first, second
            first, second = next(one, None), next(other, None)


def _latents(stack: ExitStack, folder: DatasetFolder, run: RunFile, receipt: ShardReceipt | None) -> Iterator[Latent]:
    if receipt is None:
        return iter(())
    return FORMATS[run.format].read(stack.enter_context(folder.open_seekable(receipt.payload.path)))


def _compare_windows(
    pair: tuple[Latent | None, Latent | None],
    shard_id: str,
    left: tuple[dict[str, str], dict[str, str]],
    found: DatasetComparison,
) -> None:
    one, other = pair
    if one is None or other is None:
        for side, latent in enumerate(pair):
            if latent is not None:
                left[side][latent.row.key] = shard_id
        return
    changed = _changed_fields(one.row, other.row)
    if changed:
        found.other_rows.add(f"{one.row.key} ({', '.join(changed)})")
    found.numbers.add(one.row.key, one.mean_CTHW, other.mean_CTHW)
    if one.logvar_CTHW is not None and other.logvar_CTHW is not None:
        found.numbers.add(f"{one.row.key} (logvar)", one.logvar_CTHW, other.logvar_CTHW)


def _changed_fields(one: LatentRow, other: LatentRow) -> list[str]:
    """Names of the fields that differ, but for those that say how and where the numbers are stored."""
    names = [name for name in LatentRow.__slots__ if name not in ("shard_id", "latent_dtype", "has_logvar")]
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _compare_rejections(one: ShardReceipt | None, other: ShardReceipt | None, found: DatasetComparison) -> None:
    sides = [
        {f"{rejection.key}: {rejection.error_class}" for rejection in receipt.rejections} if receipt else set[str]()
        for receipt in (one, other)
    ]
    for side, (here, there) in enumerate((sides, sides[::-1])):
        for name in sorted(here - there):
            found.rejections[side].add(name)


def _match_left(
    folders: tuple[DatasetFolder, DatasetFolder],
    runs: tuple[RunFile, RunFile],
    left: tuple[dict[str, str], dict[str, str]],
    found: DatasetComparison,
) -> None:
    """Windows that lie elsewhere on the other side: in another shard, or in another bucket of their own."""
    for side in (0, 1):
        for key in sorted(left[side].keys() - left[1 - side].keys()):
            found.only[side].add(key)
    read_rows = lru_cache(_INDICES_AT_ONCE)(_rows_by_key)

    def fetch(side: int, key: str) -> Latent:
        shard_id = left[side][key]
        row = read_rows(folders[side], shard_id)[key]
        with folders[side].open_seekable(folders[side].receipt(shard_id).payload.path) as file:
            return next(iter(FORMATS[runs[side].format].fetch(file, [row])))

    for key in sorted(left[0].keys() & left[1].keys(), key=lambda key: (left[0][key], left[1][key], key)):
        first, second = fetch(0, key), fetch(1, key)
        if first.row.latent_shape == second.row.latent_shape:
            _compare_windows((first, second), "", left, found)
        else:
            found.other_rows.add(f"{key} ({', '.join(_changed_fields(first.row, second.row))})")


def _rows_by_key(folder: DatasetFolder, shard_id: str) -> dict[str, IndexRow]:
    with folder.open_seekable(index_name(shard_id)) as file:
        return {row.row.key: row for row in read_index(file).rows}
