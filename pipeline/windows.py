"""Which of a clip's frames are kept, and in which window each one lands: arithmetic on times and counts, no pixels.

`sample` picks frames, `placements` says where a sampled frame goes, `plan_tail` what becomes of those after the last
whole window. All three need constant memory, so a clip may be of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, TypeVar

from pipeline.errors import ClipError, ConfigError, RejectionClass
from pipeline.policies import WindowPolicy

TIME_TOLERANCE = 0.0011
"""Seconds by which a frame may come late and still count as on screen: Matroska and FLV round to milliseconds."""
MAX_GAP_SECONDS = 60.0
"""Longest time one picture may stand when resampling. Beyond it the times are broken, and would become thousands of
copies of one frame."""


class Timed(Protocol):
    """Anything with a presentation time in seconds from the first frame."""

    @property
    def time(self) -> float: ...


F = TypeVar("F", bound=Timed)


@dataclass(frozen=True, slots=True)
class Tail:
    """What becomes of the sampled frames after the last whole window.

    Every sampled frame is in a window, or counted once as dropped, trimmed or unused.
    """

    kept: int = 0
    """Real frames of the tail's own window, 0 if it has none."""
    padded: int = 0
    """Copies of the last real frame at that window's end."""
    trimmed: int = 0
    """Frames cut off after that window."""
    dropped: int = 0
    """Frames of a tail without a window."""


def valid_lengths(policy: WindowPolicy, is_valid: Callable[[int], bool]) -> tuple[int, ...]:
    """Numbers of frames up to `policy.frames` that a VAE takes, ascending: what decode children, which know no VAE,
    are told of it."""
    return tuple(length for length in range(1, policy.frames + 1) if is_valid(length))


def check_window_length(policy: WindowPolicy, lengths: Sequence[int]) -> None:
    """ConfigError unless `policy.frames` is one of the VAE's lengths."""
    if policy.frames not in lengths:
        shorter = [length for length in lengths if length < policy.frames]
        raise ConfigError(
            f"windows.frames must be a length that the VAE takes, got {policy.frames}; "
            f"the longest below is {shorter[-1] if shorter else 'none'}"
        )


def sample(frames: Iterable[F], policy: WindowPolicy) -> Iterator[F]:
    """The frames that count, in order: resampled to `policy.fps`, then every `policy.frame_stride`-th.

    Resampling up repeats a frame (the same object). ClipError for a gap over MAX_GAP_SECONDS.
    """
    resampled = frames if policy.fps is None else _resample(frames, policy.fps)
    return islice(resampled, 0, None, policy.frame_stride)


def _resample(frames: Iterable[F], fps: float) -> Iterator[F]:
    """Output k is the frame on screen at k / fps. The clip ends when its last frame appears: how long that one
    stays is known to few containers, and decoders disagree."""
    tick = 0
    shown: F | None = None
    for frame in frames:
        if shown is not None:
            if frame.time - shown.time > MAX_GAP_SECONDS:
                message = f"{frame.time - shown.time:.1f} s between two frames, more than {MAX_GAP_SECONDS:g}"
                raise ClipError(RejectionClass.DECODE_FAILED, "window", message)
            while tick / fps < frame.time - TIME_TOLERANCE:
                yield shown
                tick += 1
        shown = frame
    while shown is not None and tick / fps <= shown.time + TIME_TOLERANCE:
        yield shown
        tick += 1


def placements(index: int, policy: WindowPolicy) -> Iterator[tuple[int, int]]:
    """(window, position) of every window that sampled frame `index` may belong to; none for a frame in a gap."""
    first = max(0, -(-(index - policy.frames + 1) // policy.stride))
    last = index // policy.stride
    if policy.max_windows is not None:
        last = min(last, policy.max_windows - 1)
    for window in range(first, last + 1):
        yield window, index - window * policy.stride


def whole_windows(num_sampled: int, policy: WindowPolicy) -> int:
    """Windows without padding or trimming among the first `num_sampled` sampled frames."""
    if num_sampled < policy.frames:
        return 0
    windows = (num_sampled - policy.frames) // policy.stride + 1
    return windows if policy.max_windows is None else min(windows, policy.max_windows)


def plan_tail(num_sampled: int, policy: WindowPolicy, lengths: Sequence[int]) -> Tail:
    """The tail of a clip of `num_sampled` frames; `lengths` are the VAE's, up to the policy's.

    With overlap the tail's window starts where the next whole one would have; one that would show nothing new is not
    made. Reaching `max_windows` leaves no tail.
    """
    windows = whole_windows(num_sampled, policy)
    start = windows * policy.stride
    covered = start - policy.stride + policy.frames if windows else 0
    left = num_sampled - max(start, covered)
    if left <= 0 or windows == policy.max_windows:
        return Tail()
    real = num_sampled - start
    if policy.tail == "drop" or real < policy.min_tail_frames:
        return Tail(dropped=left)
    if policy.tail == "pad":
        return Tail(kept=real, padded=policy.frames - real)
    kept = max((length for length in lengths if length <= real), default=0)
    if not kept or start + kept <= covered:
        return Tail(dropped=left)
    return Tail(kept=kept, trimmed=real - kept)


def unused_frames(num_sampled: int, policy: WindowPolicy) -> int:
    """Sampled frames in the gaps that a `window_stride` above `frames` leaves between windows."""
    gap = max(0, policy.stride - policy.frames)
    rounds, rest = divmod(num_sampled, policy.stride)
    return rounds * gap + max(0, rest - policy.frames)
