"""One clip -> its windows: decode, sample, resize, cut. Runs in the decode child; works in any process.

A window's frames are resized into its shared memory as they come, so memory does not grow with the clip, and frames
that no window wants are neither converted nor resized.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.decode.blob import Blob
from pipeline.decode.frames import FrameSource, SourceFrame, open_frames
from pipeline.decode.resize import CropBox, Resizer, resizer_for
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import BackendName, ResizePolicy, WindowPolicy
from pipeline.records import SourceVideo, Window
from pipeline.windows import Tail, placements, plan_tail, sample, unused_frames


@dataclass(frozen=True, slots=True, kw_only=True)
class ClipSummary:
    """What became of a clip's frames. Every sampled one is in a window, or counted as dropped, trimmed or unused."""

    decoder: str
    decoded_frames: int
    sampled_frames: int
    windows: int
    dropped_tail_frames: int
    padded_frames: int
    """Copies, not source frames."""
    trimmed_frames: int
    unused_frames: int
    """Sampled frames in the gaps between windows (window_stride above frames)."""
    stopped_early: bool
    """max_windows was reached: frames after it were not decoded and are in no count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedWindow:
    """A window whose pixels lie in a Blob: what crosses from the child to its parent."""

    pixels: Blob
    """frames_THWC uint8 RGB, exactly as many bytes as `shape` says."""
    shape: tuple[int, int, int]
    """(T, H, W)"""
    index: int
    frame_indices: tuple[int, ...]
    frame_times: tuple[float, ...]
    fps: float | None
    crop: CropBox
    source: SourceVideo
    padded_frames: int
    trimmed_frames: int

    def to_window(self, clip_key: str) -> Window:
        """Map the pixels (no copy, read-only) and close the Blob; the memory lives as long as the array."""
        time, height, width = self.shape
        frames_THWC = np.frombuffer(self.pixels.map(), np.uint8).reshape(time, height, width, 3)
        self.pixels.close()
        return Window(
            clip_key=clip_key,
            index=self.index,
            frames_THWC=frames_THWC,
            frame_indices=self.frame_indices,
            frame_times=self.frame_times,
            fps=self.fps,
            crop=self.crop,
            source=self.source,
            padded_frames=self.padded_frames,
            trimmed_frames=self.trimmed_frames,
        )

    def to_message(self) -> dict[str, Any]:
        """Everything but the pixels, as JSON types."""
        message = {name: getattr(self, name) for name in self.__slots__ if name not in ("pixels", "source")}
        return message | {"source": {name: getattr(self.source, name) for name in self.source.__slots__}}

    @classmethod
    def from_message(cls, message: dict[str, Any], pixels: Blob) -> DecodedWindow:
        """What `to_message` gave, with the pixels that came beside it."""
        time, height, width = message["shape"]
        x, y, kept_width, kept_height = message["crop"]
        return cls(
            pixels=pixels,
            shape=(time, height, width),
            index=message["index"],
            frame_indices=tuple(message["frame_indices"]),
            frame_times=tuple(message["frame_times"]),
            fps=message["fps"],
            crop=(x, y, kept_width, kept_height),
            source=SourceVideo(**message["source"]),
            padded_frames=message["padded_frames"],
            trimmed_frames=message["trimmed_frames"],
        )


def decode_clip(
    path: str,
    backend: BackendName,
    windows: WindowPolicy,
    resize: ResizePolicy,
    *,
    lengths: Sequence[int],
    threads: int = 1,
) -> Generator[DecodedWindow, None, ClipSummary]:
    """Windows of the clip at `path` in order; returns the summary. `lengths` are those of `valid_lengths`. ClipError
    if the clip is refused, perhaps after some windows were given: those are void."""
    with open_frames(path, backend, threads=threads) as source:
        return (yield from cut_windows(source, windows, resize, lengths=lengths))


def cut_windows(
    source: FrameSource, windows: WindowPolicy, resize: ResizePolicy, *, lengths: Sequence[int]
) -> Generator[DecodedWindow, None, ClipSummary]:
    """`decode_clip` for frames from anywhere."""
    cutter = _Cutter(source, windows, resizer_for(source.video, resize))
    yield from cutter.whole_windows()
    tail = Tail() if cutter.stopped_early else plan_tail(cutter.sampled, windows, lengths)
    if tail.kept:
        yield cutter.tail_window(tail)
    if not cutter.given:
        message = f"{cutter.sampled} sampled of {cutter.decoded} decoded frames, a window has {windows.frames}"
        raise ClipError(RejectionClass.TOO_SHORT, "window", message)
    return ClipSummary(
        decoder=source.video.decoder,
        decoded_frames=cutter.decoded,
        sampled_frames=cutter.sampled,
        windows=cutter.given,
        dropped_tail_frames=tail.dropped,
        padded_frames=tail.padded,
        trimmed_frames=tail.trimmed,
        unused_frames=unused_frames(cutter.sampled, windows),
        stopped_early=cutter.stopped_early,
    )


class _Cutter:
    """Puts sampled frames into the windows that want them, and counts."""

    def __init__(self, source: FrameSource, policy: WindowPolicy, resizer: Resizer) -> None:
        self._source = source
        self._policy = policy
        self._resizer = resizer
        self._open: dict[int, _OpenWindow] = {}
        self.decoded = 0
        self.sampled = 0
        self.given = 0
        self.stopped_early = False

    def whole_windows(self) -> Iterator[DecodedWindow]:
        resized: tuple[SourceFrame, np.ndarray] | None = None
        for frame in sample(self._count_decoded(), self._policy):
            for window, position in placements(self.sampled, self._policy):
                if resized is None or resized[0] is not frame:  # overlapping windows and upsampling share the work
                    resized = frame, self._resizer(frame.rgb())
                self._put(window, position, frame, resized[1])
            self.sampled += 1
            finished = self._open.get(self.given)
            if finished is not None and finished.is_full:
                yield self._finish(Tail(kept=self._policy.frames))
            if self.given == self._policy.max_windows:
                self.stopped_early = True
                return

    def tail_window(self, tail: Tail) -> DecodedWindow:
        return self._finish(tail)

    def _count_decoded(self) -> Iterator[SourceFrame]:
        for frame in self._source:
            self.decoded += 1
            yield frame

    def _put(self, window: int, position: int, frame: SourceFrame, pixels_HWC: np.ndarray) -> None:
        if position == 0:
            self._open[window] = _OpenWindow(self._policy.frames, self._resizer.bucket)
        self._open[window].append(frame, pixels_HWC)

    def _finish(self, plan: Tail) -> DecodedWindow:
        video = self._source.video
        rate = self._policy.fps or video.fps
        finished = self._open.pop(self.given).finish(
            plan,
            index=self.given,
            fps=rate / self._policy.frame_stride if rate else None,
            crop=self._resizer.crop,
            source=video,
        )
        self.given += 1
        return finished


class _OpenWindow:
    """A window being filled."""

    def __init__(self, frames: int, bucket: tuple[int, int]) -> None:
        self._blob = Blob.create("window")
        self._blob.resize(frames * bucket[0] * bucket[1] * 3)
        mapped = self._blob.map(writable=True)
        self._frames_THWC = np.frombuffer(mapped, np.uint8).reshape(frames, *bucket, 3)
        self._indices: list[int] = []
        self._times: list[float] = []

    @property
    def is_full(self) -> bool:
        return len(self._indices) == len(self._frames_THWC)

    def append(self, frame: SourceFrame, pixels_HWC: np.ndarray) -> None:
        self._frames_THWC[len(self._indices)] = pixels_HWC
        self._indices.append(frame.number)
        self._times.append(frame.time)

    def finish(
        self, plan: Tail, *, index: int, fps: float | None, crop: CropBox, source: SourceVideo
    ) -> DecodedWindow:
        """The first `kept` frames and `padded` copies of the last of them."""
        length = plan.kept + plan.padded
        self._frames_THWC[plan.kept : length] = self._frames_THWC[plan.kept - 1]
        _, height, width, _ = self._frames_THWC.shape
        del self._frames_THWC  # the mapping must be gone before the memory shrinks
        self._blob.resize(length * height * width * 3)
        return DecodedWindow(
            pixels=self._blob,
            shape=(length, height, width),
            index=index,
            frame_indices=(*self._indices[: plan.kept], *[self._indices[plan.kept - 1]] * plan.padded),
            frame_times=(*self._times[: plan.kept], *[self._times[plan.kept - 1]] * plan.padded),
            fps=fps,
            crop=crop,
            source=source,
            padded_frames=plan.padded,
            trimmed_frames=plan.trimmed,
        )
