"""One drawn sample -> the pixels that are trained on: which frames, which crop, decoded in killable children.

The cut of a sample is drawn from a seed of its own, so that it does not depend on who decodes it or when.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

import numpy as np

from pipeline.decode.blob import Blob
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodePool, WindowReady
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import DecodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Clip, Window
from pipeline.training.images import ImageDecoder
from pipeline.training.settings import SampleSource

ASPECTS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9, 2.0, 2.39)
"""Long over short side of the frames that crops are taken from; a clip takes the nearest, its excess is cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What is taken of a sample."""

    frame_stride: int
    start: int
    """First source frame."""
    short_side: int
    at: tuple[float, float]
    """Where the crop lies in the room there is, down and right: 0 to 1."""


def draw_cut(source: SampleSource, seed: str) -> Cut:
    """The cut of the sample that `seed` names; centred crops take the smallest stride and size, and frame 0."""
    if source.crop == "center":
        return Cut(frame_stride=source.frame_stride[0], start=0, short_side=source.short_sides[0], at=(0.5, 0.5))
    rng = random.Random(seed)
    return Cut(
        frame_stride=rng.randint(*source.frame_stride),
        start=rng.randint(0, source.max_start),
        short_side=rng.randint(*source.short_sides),
        at=(rng.random(), rng.random()),
    )


class SampleDecoder:
    """Decode children for clips and pictures, shared by threads. Close it, or use it as a context manager."""

    def __init__(self, num_children: int, sources: tuple[SampleSource, ...]) -> None:
        """PipelineError if a child does not start, ConfigError if no video decoder is installed."""
        media = {source.media for source in sources}
        self._images = ImageDecoder(num_children) if "image" in media else None
        self._videos = DecodePool(DecodePolicy(windows_in_flight=1), num_children) if "video" in media else None

    def decode(self, clip: Clip, source: SampleSource, cut: Cut) -> np.ndarray:
        """uint8 RGB (T, H, W, 3) of the source's frames and size; closes the clip's Blob. ClipError if refused."""
        with clip.video:
            if source.media == "image":
                return self._picture(clip, source, cut)
            return _crop(self._longest(clip, source, cut), source.size, cut.at)

    def _picture(self, clip: Clip, source: SampleSource, cut: Cut) -> np.ndarray:
        assert self._images is not None
        data = os.pread(clip.video.fd, clip.video.size, 0)
        return self._images.crop(data, short_side=cut.short_side, size=source.size, at=cut.at)[None]

    def _longest(self, clip: Clip, source: SampleSource, cut: Cut) -> np.ndarray:
        """Frames at the cut's stride, or at half of it as often as the clip is too short."""
        stride = cut.frame_stride
        while True:
            try:
                return self._frames(clip, source, cut, stride)
            except ClipError as error:
                if error.error_class is not RejectionClass.TOO_SHORT or stride == 1:
                    raise
            stride = max(1, stride // 2)

    def _frames(self, clip: Clip, source: SampleSource, cut: Cut, stride: int) -> np.ndarray:
        """Of the window at the cut's start, or of the clip's first where that one is not there."""
        assert self._videos is not None
        offset = cut.start // stride
        windows = WindowPolicy(
            frames=source.frames, frame_stride=stride, window_stride=offset or None, max_windows=2 if offset else 1
        )
        # the pool closes what it was given
        again = replace(clip, video=Blob(os.dup(clip.video.fd), clip.video.size))
        last: Window | None = None
        for event in self._videos.decode(iter([again]), windows, _buckets(cut.short_side), (source.frames,)):
            match event:
                case WindowReady(window, _):
                    last = window
                case ClipRetracted():
                    last = None
                case ClipDone(_, _, rejection) if rejection is not None:
                    raise ClipError(RejectionClass(rejection.error_class), rejection.stage, rejection.message)
        assert last is not None, "a clip without a window is rejected"
        return last.frames_THWC

    def close(self) -> None:
        for decoder in (self._images, self._videos):
            if decoder is not None:
                decoder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _buckets(short_side: int) -> ResizePolicy:
    long_sides = [round(short_side * aspect) for aspect in ASPECTS]
    wide = [(short_side, long) for long in long_sides]
    tall = [(long, short_side) for long in long_sides[1:]]
    return ResizePolicy(buckets=tuple(wide + tall))


def _crop(frames_THWC: np.ndarray, size: tuple[int, int], at: tuple[float, float]) -> np.ndarray:
    """A copy, so that the window's shared memory can go."""
    _, height, width, _ = frames_THWC.shape
    top, left = round(at[0] * (height - size[0])), round(at[1] * (width - size[1]))
    return np.ascontiguousarray(frames_THWC[:, top : top + size[0], left : left + size[1]])
