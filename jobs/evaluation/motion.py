"""How much moves in a clip, and a subset of clips that spreads evenly over it (IV-VAE's MotionHD).

The score is the mean length of dense optical flow between neighbouring frames, in pixels of a 768 x 432 picture.
MotionHD's own comes from RAFT, whose weights are on no package index; here it is OpenCV's DIS, so that scores of the
two are not the same numbers. What counts for the choice is their order.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np

from pipeline.errors import ConfigError

FLOW_SIZE: tuple[int, int] = (768, 432)
"""Width and height at which MotionHD measures motion."""
BINS = 20


class MotionMeter:
    """Scores windows. ConfigError if OpenCV is not installed."""

    def __init__(self) -> None:
        try:
            import cv2
        except ImportError as error:
            raise ConfigError(
                "motion scores need OpenCV: pip install 'cvvae-latents[evaluate]', or evaluate with --motion off"
            ) from error
        cv2.setNumThreads(1)  # its sums depend on how many threads share a picture
        self._cv2 = cv2
        self._flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def __call__(self, frames_THWC: np.ndarray) -> float | None:
        """Pixels per frame; None for a single image."""
        before: np.ndarray | None = None
        lengths = []
        for frame_HWC in frames_THWC:
            small = self._cv2.resize(frame_HWC, FLOW_SIZE, interpolation=self._cv2.INTER_AREA)
            grey = self._cv2.cvtColor(small, self._cv2.COLOR_RGB2GRAY)
            if before is not None:
                # no flow to start from: each pair is measured apart
                flow_HW2 = self._flow.calc(before, grey, None)  # type: ignore[call-overload]
                lengths.append(float(np.linalg.norm(flow_HW2, axis=2).mean()))
            before = grey
        return sum(lengths) / len(lengths) if lengths else None


def choose_evenly(scores: Mapping[str, float], count: int, *, seed: int) -> frozenset[str]:
    """`count` keys whose scores are as near to uniform as the clips allow; all of them if there are no more.

    The range of scores up to their 99th percentile is cut into 20 equal bins (what lies above joins the last); the
    bins give one random clip each in turn until there are enough.
    """
    if len(scores) <= count:
        return frozenset(scores)
    values = np.array(list(scores.values()))
    low, high = float(values.min()), float(np.percentile(values, 99))
    edges = np.linspace(low, high, BINS + 1)[1:-1]
    bins: list[list[str]] = [[] for _ in range(BINS)]
    for key in sorted(scores):
        bins[int(np.searchsorted(edges, scores[key], side="right"))].append(key)
    generator = random.Random(seed)
    for keys in bins:
        generator.shuffle(keys)
    chosen: list[str] = []
    while len(chosen) < count:
        turn = [keys.pop() for keys in bins if keys]
        generator.shuffle(turn)  # so that a last turn that is cut short favours no bin
        chosen += turn
    return frozenset(chosen[:count])


def quantile_edges(scores: list[float], buckets: int) -> list[float]:
    """Edges that cut the scores into so many buckets of equal count; fewer where scores are equal."""
    if not scores:
        return []
    inner = np.quantile(np.array(scores), np.arange(1, buckets) / buckets)
    return sorted({float(edge) for edge in inner if min(scores) < edge})
