"""Means over windows that need no list of windows, and the record on disk that has one line per window."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from cvvae.frechet import FeatureStatistics, frechet_distance
from cvvae.i3d import NUM_LOGITS
from jobs.evaluation.clips import SourceWindow
from jobs.evaluation.measure import Measured
from jobs.evaluation.presets import METRICS, ClipShape, Metric


@dataclass(slots=True)
class RunningMean:
    """Mean and standard error of numbers seen one by one (Welford 1962). NaN is counted and left out."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    undefined: int = 0

    def add(self, value: float) -> None:
        if math.isnan(value):
            self.undefined += 1
            return
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.squares += step * (value - self.mean)

    @property
    def standard_error(self) -> float | None:
        """Of the mean; None with fewer than two numbers."""
        return math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else None

    def to_json(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            "mean": self.mean if self.count else None,
            "standard_error": self.standard_error,
            "count": self.count,
        }
        return summary | ({"undefined": self.undefined} if self.undefined else {})


@dataclass(slots=True)
class VAETotals:
    """One VAE on the windows of one shape."""

    values: dict[Metric, RunningMean] = field(default_factory=dict)
    over_first: dict[Metric, RunningMean] = field(default_factory=dict)
    """The difference to the first VAE on the same window: its error is far below that of two means."""
    by_frame: dict[Metric, list[RunningMean]] = field(default_factory=dict)
    by_position: dict[Metric, dict[int, RunningMean]] = field(default_factory=dict)
    features: FeatureStatistics = field(default_factory=lambda: FeatureStatistics.empty(NUM_LOGITS))


class ShapeTotals:
    """All VAEs on the windows of one shape."""

    def __init__(self, shape: ClipShape, positions: dict[str, tuple[int | None, ...]]) -> None:
        """`positions` has `group_positions` of each VAE by its label; the first label is what others are held to."""
        self.shape = shape
        self.windows = 0
        self._positions = positions
        self.vaes = {label: VAETotals() for label in positions}
        self.source_features = FeatureStatistics.empty(NUM_LOGITS)

    def add(self, measured: Measured) -> None:
        self.windows += 1
        first = next(iter(measured.figures.values()))
        for label, figures in measured.figures.items():
            totals = self.vaes[label]
            for metric, value in figures.values.items():
                totals.values.setdefault(metric, RunningMean()).add(value)
                totals.over_first.setdefault(metric, RunningMean()).add(value - first.values[metric])
            for metric, values in figures.frames.items():
                self._add_frames(totals, metric, values, self._positions[label])
            if figures.features_D is not None:
                totals.features.add(figures.features_D[None])
        if measured.source_features_D is not None:
            self.source_features.add(measured.source_features_D[None])

    @staticmethod
    def _add_frames(
        totals: VAETotals, metric: Metric, values: list[float], positions: tuple[int | None, ...]
    ) -> None:
        by_frame = totals.by_frame.setdefault(metric, [RunningMean() for _ in values])
        by_position = totals.by_position.setdefault(metric, {})
        for running, value, position in zip(by_frame, values, positions, strict=True):
            running.add(value)
            if position is not None:
                by_position.setdefault(position, RunningMean()).add(value)

    def to_json(self) -> dict[str, Any]:
        """Every figure, ready for JSON; fvd is None with fewer than two windows."""
        return {
            "shape": {"frames": self.shape.frames, "size": self.shape.size},
            "windows": self.windows,
            "vaes": {label: self._summary(totals) for label, totals in self.vaes.items()},
        }

    def _summary(self, totals: VAETotals) -> dict[str, Any]:
        means: dict[str, Any] = {metric: running.to_json() for metric, running in totals.values.items()}
        if totals.features.count:
            enough = totals.features.count > 1
            distance = frechet_distance(totals.features, self.source_features) if enough else None
            means["fvd"] = {"mean": distance, "standard_error": None, "count": totals.features.count}
        return {
            "metrics": means,
            "over_first": {metric: running.to_json() for metric, running in totals.over_first.items()},
            "by_frame": {metric: [running.mean for running in each] for metric, each in totals.by_frame.items()},
            "by_position": {
                metric: {str(position): each[position].mean for position in sorted(each)}
                for metric, each in totals.by_position.items()
            },
        }


# --- a line per window --------------------------------------------------------------------------------------------


def write_window(file: TextIO, shape: ClipShape, measured: Measured, motion: float | None) -> None:
    """One line of windows.jsonl."""
    vaes = {
        label: {**{m: None if math.isnan(v) else v for m, v in figures.values.items()}, "frames": figures.frames}
        for label, figures in measured.figures.items()
    }
    write_line(file, shape, measured.window, motion, vaes)


def write_line(
    file: TextIO, shape: ClipShape, window: SourceWindow, motion: float | None, vaes: dict[str, Any]
) -> None:
    """A window and what was found of each VAE, as a line of JSON that `read_windows` reads."""
    _, height, width, _ = window.frames_THWC.shape
    line = {
        "key": window.key,
        "frames": shape.frames,
        "size": [height, width],
        "own_size": shape.size is None,
        "motion": motion,
        "vaes": vaes,
    }
    file.write(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n")


def read_windows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines again."""
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def motion_table(lines: Iterable[dict[str, Any]], edges: list[float]) -> list[dict[str, Any]]:
    """Means of every metric by bucket of motion. `edges` are those between buckets, ascending."""
    buckets: list[dict[str, dict[str, RunningMean]]] = [{} for _ in range(len(edges) + 1)]
    windows = [0] * len(buckets)
    for line in lines:
        if line["motion"] is None:
            continue
        number = int(np.searchsorted(edges, line["motion"], side="right"))
        windows[number] += 1
        for label, values in line["vaes"].items():
            of_vae = buckets[number].setdefault(label, {})
            for metric in METRICS:
                if values.get(metric) is not None:
                    of_vae.setdefault(metric, RunningMean()).add(values[metric])
    spans = zip([None, *edges], [*edges, None], strict=True)
    return [
        {
            "from": low,
            "to": high,
            "windows": count,
            "vaes": {label: {metric: run.to_json() for metric, run in of.items()} for label, of in bucket.items()},
        }
        for (low, high), count, bucket in zip(spans, windows, buckets, strict=True)
        if count
    ]
