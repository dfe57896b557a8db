"""Clips to windows in one process: which frames land where, and that no work is done for nothing."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pytest

from pipeline.decode.clips import ClipSummary, DecodedWindow, cut_windows, decode_clip
from pipeline.decode.frames import SourceFrame
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.records import SourceVideo, Window
from tests.awkward_clips import CODE_HEIGHT, CODE_WIDTH, LENGTHS, ClipMaker, coded_frame, read_codes

CODED = ResizePolicy(buckets=((CODE_HEIGHT, CODE_WIDTH),))


class CodedSource:
    """Coded frames without a file, which counts what is asked of it."""

    def __init__(self, count: int, rate: float = 25.0) -> None:
        self.count, self.rate = count, rate
        self.decoded = 0
        self.converted: list[int] = []
        self.video = SourceVideo(
            width=CODE_WIDTH,
            height=CODE_HEIGHT,
            sample_aspect_ratio=1.0,
            rotation=0,
            fps=rate,
            duration=count / rate,
            codec="none",
            decoder="coded-1",
        )

    def __iter__(self) -> Iterator[SourceFrame]:
        for number in range(self.count):
            self.decoded += 1
            yield SourceFrame(number, number / self.rate, lambda number=number: self._convert(number))

    def _convert(self, number: int) -> np.ndarray:
        self.converted.append(number)
        return coded_frame(number)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def collect(windows: Generator[DecodedWindow, None, ClipSummary]) -> tuple[list[Window], ClipSummary]:
    given = []
    while True:
        try:
            given.append(next(windows).to_window("clip"))
        except StopIteration as end:
            return given, end.value


def cut(source: CodedSource, policy: WindowPolicy) -> tuple[list[Window], ClipSummary]:
    windows, summary = collect(cut_windows(source, policy, CODED, lengths=LENGTHS))
    for window in windows:
        assert tuple(read_codes(window.frames_THWC)) == window.frame_indices
        assert window.frame_times == tuple(number / source.rate for number in window.frame_indices)
        assert len(window.frame_indices) == window.shape[0]
    assert [window.index for window in windows] == list(range(len(windows))) == list(range(summary.windows))
    return windows, summary


def test_windows_and_a_dropped_tail() -> None:
    source = CodedSource(40)
    windows, summary = cut(source, WindowPolicy(frames=17))
    assert [window.frame_indices for window in windows] == [tuple(range(17)), tuple(range(17, 34))]
    assert windows[0].fps == 25.0
    assert windows[0].key == "clip_00000"
    assert windows[0].crop == (0, 0, CODE_WIDTH, CODE_HEIGHT)
    assert summary == ClipSummary(
        decoder="coded-1",
        decoded_frames=40,
        sampled_frames=40,
        windows=2,
        dropped_tail_frames=6,
        padded_frames=0,
        trimmed_frames=0,
        unused_frames=0,
        stopped_early=False,
    )


def test_a_padded_tail_repeats_its_last_frame_and_says_so() -> None:
    windows, summary = cut(CodedSource(40), WindowPolicy(frames=17, tail="pad"))
    assert windows[2].frame_indices == (34, 35, 36, 37, 38, *[39] * 12)
    assert (windows[2].padded_frames, summary.padded_frames) == (11, 11)


def test_a_trimmed_tail_has_a_valid_length() -> None:
    windows, summary = cut(CodedSource(41), WindowPolicy(frames=17, tail="trim"))
    assert windows[2].frame_indices == (34, 35, 36, 37, 38)
    assert (windows[2].trimmed_frames, summary.trimmed_frames, summary.dropped_tail_frames) == (2, 2, 0)
    short, _ = cut(CodedSource(7), WindowPolicy(frames=17, tail="trim"))
    assert [window.shape[0] for window in short] == [5]


def test_overlapping_windows_share_their_frames() -> None:
    source = CodedSource(30)
    windows, summary = cut(source, WindowPolicy(frames=9, window_stride=4, tail="pad"))
    assert [window.frame_indices[0] for window in windows] == [0, 4, 8, 12, 16, 20, 24]
    assert windows[-1].padded_frames == 3
    assert source.converted == list(range(30))  # each once, though most are in three windows
    assert summary.sampled_frames == 30


def test_only_wanted_frames_are_converted() -> None:
    source = CodedSource(60)
    windows, summary = cut(source, WindowPolicy(frames=5, frame_stride=3, window_stride=8))
    assert [window.frame_indices for window in windows] == [(0, 3, 6, 9, 12), (24, 27, 30, 33, 36)]
    assert windows[0].fps == pytest.approx(25 / 3)
    assert source.converted == [0, 3, 6, 9, 12, 24, 27, 30, 33, 36, 48, 51, 54, 57]
    assert (summary.sampled_frames, summary.unused_frames, summary.dropped_tail_frames) == (20, 6, 4)


def test_decoding_stops_at_the_last_wanted_window() -> None:
    source = CodedSource(200)
    windows, summary = cut(source, WindowPolicy(frames=9, max_windows=2, tail="pad"))
    assert len(windows) == 2
    assert source.decoded == summary.decoded_frames == 18
    assert summary.stopped_early


def test_resampling_up_converts_each_frame_once() -> None:
    source = CodedSource(20, rate=10.0)
    windows, _ = cut(source, WindowPolicy(frames=9, fps=20))
    assert windows[0].frame_indices == (0, 0, 1, 1, 2, 2, 3, 3, 4)
    assert windows[0].fps == 20
    assert source.converted == list(range(20))


def test_a_clip_without_a_window_is_too_short() -> None:
    with pytest.raises(ClipError, match="12 sampled of 12 decoded frames, a window has 17") as caught:
        cut(CodedSource(12), WindowPolicy(frames=17))
    assert caught.value.error_class is RejectionClass.TOO_SHORT
    with pytest.raises(ClipError) as caught:
        cut(CodedSource(12), WindowPolicy(frames=17, tail="pad", min_tail_frames=13))
    assert caught.value.error_class is RejectionClass.TOO_SHORT


def test_memory_does_not_grow_with_the_clip(maker: ClipMaker) -> None:
    """One window in memory at a time, whatever the length of the clip: each is 9 frames of 4.7 MB."""
    import resource

    path = maker.coded(120, "long.mp4", "-vf", "scale=1600:960", "-c:v", "libx264", "-preset", "ultrafast")
    policy, resize = WindowPolicy(frames=9), ResizePolicy(buckets=((960, 1600),))
    peaks = []
    for limit in (3, None):
        windows = decode_clip(
            str(path), "pyav", policy.model_copy(update={"max_windows": limit}), resize, lengths=LENGTHS
        )
        count = sum(1 for window in windows if window.pixels.close() is None)
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    assert count == 13
    assert peaks[1] - peaks[0] < 3 * 42 << 10  # KiB: three of the thirteen windows


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_files_end_to_end_by_content(maker: ClipMaker, backend: str) -> None:
    """Variable rate, turned, behind an edit list, resampled: the frame on screen at k / 8 seconds."""
    coded = maker.coded(
        120, "everything.mp4", "-c:v", "libx264", "-g", "10", "-crf", "12", "-pix_fmt", "yuv420p", quarter_turns=3
    )
    variable = maker.convert(
        *(coded, "everything_vfr.mp4", "-vf", "select='not(mod(n,3))+not(mod(n,5))'", "-fps_mode", "vfr"),
        *("-c:v", "libx264", "-g", "7", "-crf", "12"),
    )
    path = maker.convert(
        variable, "everything_edit.mp4", "-c", "copy", before=("-display_rotation", "90", "-ss", "0.8")
    )
    policy = WindowPolicy(frames=5, fps=8.0)
    windows, summary = collect(decode_clip(str(path), backend, policy, CODED, lengths=LENGTHS))
    shown = [n for n in range(120) if n % 3 == 0 or n % 5 == 0]
    start = 20
    expected = [max(n for n in shown if n <= start + k * 25 / 8 + 0.03) for k in range(32)]
    assert [code for window in windows for code in read_codes(window.frames_THWC)] == expected[: 5 * len(windows)]
    assert len(windows) == 6
    assert windows[0].source.rotation == 270
    assert summary.decoder == windows[0].source.decoder
    for window in windows:
        times = [(expected[5 * window.index + k] - start) / 25 for k in range(5)]
        assert window.frame_times == pytest.approx(times, abs=1e-6)


def test_a_message_holds_a_window_exactly(real_clips: dict[str, Path]) -> None:
    import json

    clip = str(real_clips["no_face.mp4"])
    windows = decode_clip(clip, "pyav", WindowPolicy(tail="pad"), ResizePolicy(), lengths=LENGTHS)
    *_, last = windows
    again = DecodedWindow.from_message(json.loads(json.dumps(last.to_message())), last.pixels)
    assert again == last
    window = again.to_window("clip")
    assert not window.frames_THWC.flags.writeable
    assert window.frames_THWC.shape == (17, 256, 256, 3)
