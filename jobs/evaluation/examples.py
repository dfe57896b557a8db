"""A few windows kept to be looked at: the worst of each VAE, and the first ones. Bounded, whatever is measured."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from PIL import Image

from jobs.evaluation.measure import Figures, Measured
from jobs.evaluation.presets import LOWER_IS_BETTER, ClipShape, Metric

MAX_SIDE = 288
"""Longer side of a kept picture, in pixels."""
MAX_FRAMES = 17
ERROR_GAIN = 4


@dataclass(frozen=True, slots=True)
class Example:
    """A window as it is shown: small animations and, at the frame a VAE did worst, its error."""

    key: str
    shape: ClipShape
    values: dict[str, dict[Metric, float]]
    source: str
    """data: URI of an animated WebP, as the two below are."""
    decoded: dict[str, str]
    errors: dict[str, str]
    worst_frame: dict[str, int]


@dataclass(frozen=True, slots=True)
class _Kept:
    badness: float
    order: int
    measured: Measured
    shape: ClipShape


class Gallery:
    """Keeps `worst` windows of each VAE and the first `first` windows, of each shape."""

    def __init__(self, *, worst: int = 3, first: int = 2) -> None:
        self._worst = worst
        self._first = first
        self._seen: dict[ClipShape, int] = {}
        self._kept_first: list[_Kept] = []
        self._kept_worst: dict[tuple[ClipShape, str], list[_Kept]] = {}

    def add(self, measured: Measured, shape: ClipShape) -> None:
        """Look at a window; its pixels are kept, made small, only if it is among those."""
        order = self._seen[shape] = self._seen.get(shape, 0) + 1
        small: Measured | None = None
        if order <= self._first:
            small = _small(measured)
            self._kept_first.append(_Kept(0.0, order, small, shape))
        for label, figures in measured.figures.items():
            kept = self._kept_worst.setdefault((shape, label), [])
            badness = _badness(figures)
            if badness is None:
                continue
            if len(kept) < self._worst or badness > kept[-1].badness:
                small = small or _small(measured)
                kept.append(_Kept(badness, order, small, shape))
                kept.sort(key=lambda one: (-one.badness, one.order))
                del kept[self._worst :]

    def worst(self) -> list[tuple[ClipShape, str, list[Example]]]:
        """(shape, VAE, its worst windows), the worst first."""
        return [(shape, label, [_example(one) for one in kept]) for (shape, label), kept in self._kept_worst.items()]

    def first(self) -> list[Example]:
        return [_example(one) for one in self._kept_first]


def _badness(figures: Figures) -> float | None:
    """By the first of these that was measured; None if none was, or it is undefined (NaN)."""
    order: tuple[Metric, ...] = ("psnr", "psnr_video", "ssim", "information", "lpips")
    for metric in order:
        if metric in figures.values and not math.isnan(figures.values[metric]):
            return figures.values[metric] * (1 if metric in LOWER_IS_BETTER else -1)
    return None


def _small(measured: Measured) -> Measured:
    """The same window with pictures of at most MAX_SIDE and MAX_FRAMES."""
    window = measured.window
    source_THWC = shrunk(window.frames_THWC)
    decoded = {label: shrunk(frames) for label, frames in measured.decoded_THWC.items()}
    small_window = type(window)(window.key, window.clip_key, source_THWC, window.fps)
    return Measured(small_window, measured.figures, decoded, None)


def shrunk(frames_THWC: np.ndarray, *, max_frames: int = MAX_FRAMES) -> np.ndarray:
    """uint8 frames as they are shown: the first `max_frames`, with the longer side MAX_SIDE at most."""
    frames_THWC = frames_THWC[:max_frames]
    _, height, width, _ = frames_THWC.shape
    ratio = min(1.0, MAX_SIDE / max(height, width))
    if ratio == 1.0:
        return frames_THWC.copy()
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    return np.stack([np.asarray(Image.fromarray(f).resize(size, Image.Resampling.LANCZOS)) for f in frames_THWC])


def _example(kept: _Kept) -> Example:
    measured = kept.measured
    source_THWC = measured.window.frames_THWC
    worst: dict[str, int] = {}
    errors: dict[str, str] = {}
    for label, decoded_THWC in measured.decoded_THWC.items():
        difference = np.abs(decoded_THWC.astype(np.int16) - source_THWC.astype(np.int16))
        worst[label] = int(difference.mean(axis=(1, 2, 3)).argmax())
        amplified = np.minimum(difference[worst[label]] * ERROR_GAIN, 255).astype(np.uint8)
        errors[label] = picture_uri((amplified,))
    return Example(
        key=measured.window.key,
        shape=kept.shape,
        values={label: dict(figures.values) for label, figures in measured.figures.items()},
        source=picture_uri(source_THWC),
        decoded={label: picture_uri(frames) for label, frames in measured.decoded_THWC.items()},
        errors=errors,
        worst_frame=worst,
    )


def picture_uri(frames: Iterable[np.ndarray], *, milliseconds: int = 120) -> str:
    """(H, W, 3) uint8 frames as a data: URI of a WebP, animated if there are more than one."""
    first, *others = [Image.fromarray(np.ascontiguousarray(frame)) for frame in frames]
    buffer = io.BytesIO()
    animation = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0} if others else {}
    first.save(buffer, "WEBP", quality=80, method=2, **animation)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
