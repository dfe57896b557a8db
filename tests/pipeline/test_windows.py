"""Sampling and windowing against slow, obvious versions of what WindowPolicy promises."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import ClipError, ConfigError, RejectionClass
from pipeline.policies import WindowPolicy
from pipeline.windows import (
    MAX_GAP_SECONDS,
    TIME_TOLERANCE,
    Tail,
    check_window_length,
    placements,
    plan_tail,
    sample,
    unused_frames,
    valid_lengths,
    whole_windows,
)


@dataclass(frozen=True)
class Picture:
    number: int
    time: float


def at(times: list[float]) -> list[Picture]:
    return [Picture(number, time) for number, time in enumerate(times)]


def numbers(times: list[float], policy: WindowPolicy) -> list[int]:
    return [picture.number for picture in sample(at(times), policy)]


policies = st.builds(
    WindowPolicy,
    frames=st.integers(1, 9),
    window_stride=st.none() | st.integers(1, 14),
    max_windows=st.none() | st.integers(1, 4),
    tail=st.sampled_from(["drop", "pad", "trim"]),
    min_tail_frames=st.integers(1, 5),
)

lengths_of_vaes = st.sampled_from([set(range(1, 60, stride)) for stride in (1, 2, 4)]) | st.sets(st.integers(1, 60))
"""Of time strides, and of families with a rule of their own."""
LENGTHS = tuple(range(1, 60, 4))


def test_without_fps_every_frame_counts() -> None:
    assert numbers([0.0, 0.1, 0.5, 0.5], WindowPolicy()) == [0, 1, 2, 3]
    assert numbers([n / 10 for n in range(10)], WindowPolicy(frame_stride=4)) == [0, 4, 8]


@pytest.mark.parametrize(
    ("source", "fps", "expected"),
    [
        (30, 10, [0, 3, 6, 9, 12]),
        (25, 10, [0, 2, 5, 7, 10]),
        (5, 10, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12]),
        (24, 24, list(range(13))),
    ],
)
def test_constant_rates(source: int, fps: int, expected: list[int]) -> None:
    assert numbers([n / source for n in range(13)], WindowPolicy(fps=fps)) == expected


@pytest.mark.parametrize("fps", [30000 / 1001, 30.0, 24000 / 1001, 25.0])
@pytest.mark.parametrize("rounded_to", [None, 3, 6])
def test_a_clip_at_its_own_rate_is_unchanged_however_times_are_rounded(fps: float, rounded_to: int | None) -> None:
    times = [n / fps if rounded_to is None else round(n / fps, rounded_to) for n in range(2000)]
    assert numbers(times, WindowPolicy(fps=fps)) == list(range(2000))


@given(st.lists(st.floats(0, 0.5), min_size=0, max_size=40), st.sampled_from([1.0, 5.0, 12.5, 24.0, 29.97]))
def test_output_k_is_the_frame_on_screen_at_k_over_fps(gaps: list[float], fps: float) -> None:
    times = [0.0]
    for gap in gaps:
        times.append(times[-1] + gap)
    chosen = numbers(times, WindowPolicy(fps=fps))
    on_screen = []
    while len(on_screen) / fps <= times[-1] + TIME_TOLERANCE:
        moment = len(on_screen) / fps
        on_screen.append(max(n for n, time in enumerate(times) if not moment < time - TIME_TOLERANCE))
    assert chosen == on_screen


def test_sampling_is_lazy() -> None:
    def endless():
        number = 0
        while True:
            yield Picture(number, number / 25)
            number += 1

    sampled = sample(endless(), WindowPolicy(fps=5, frame_stride=2))
    assert [next(sampled).number for _ in range(4)] == [0, 10, 20, 30]


def test_a_broken_clock_is_refused_only_where_it_would_multiply_frames() -> None:
    times = [0.0, 0.04, 95443.7]
    assert numbers(times, WindowPolicy()) == [0, 1, 2]
    with pytest.raises(ClipError, match=f"more than {MAX_GAP_SECONDS:g}") as caught:
        numbers(times, WindowPolicy(fps=25))
    assert caught.value.error_class is RejectionClass.DECODE_FAILED


@given(st.integers(0, 60), policies)
def test_placements_are_the_windows_that_hold_a_frame(index: int, policy: WindowPolicy) -> None:
    windows = range(policy.max_windows if policy.max_windows is not None else index + 1)
    expected = [
        (window, index - window * policy.stride)
        for window in windows
        if 0 <= index - window * policy.stride < policy.frames
    ]
    assert list(placements(index, policy)) == expected


@given(st.integers(0, 60), policies, lengths_of_vaes)
def test_every_sampled_frame_is_counted_once(count: int, policy: WindowPolicy, of_vae: set[int]) -> None:
    lengths = valid_lengths(policy, of_vae.__contains__)
    windows = whole_windows(count, policy)
    if windows == policy.max_windows:  # decoding stops with the last frame of the last window
        count = (windows - 1) * policy.stride + policy.frames
    covered = {w * policy.stride + p for w in range(windows) for p in range(policy.frames)}
    assert not covered or max(covered) < count
    tail = plan_tail(count, policy, lengths)
    start = windows * policy.stride
    covered |= set(range(start, start + tail.kept))
    assert len(covered) + tail.dropped + tail.trimmed + unused_frames(count, policy) == count
    length = tail.kept + tail.padded
    if tail.kept:
        assert policy.tail != "drop"
        assert count - start >= policy.min_tail_frames
        assert length <= policy.frames
        assert length == policy.frames if policy.tail == "pad" else length in lengths
        longer = range(tail.kept + 1, tail.kept + tail.trimmed + 1)
        assert policy.tail == "pad" or not set(longer) & set(lengths)
        assert tail.dropped == 0


@pytest.mark.parametrize(
    ("tail", "count", "expected"),
    [
        ("drop", 20, Tail(dropped=3)),
        ("pad", 20, Tail(kept=3, padded=14)),
        ("trim", 20, Tail(kept=1, trimmed=2)),
        ("trim", 24, Tail(kept=5, trimmed=2)),
        ("trim", 33, Tail(kept=13, trimmed=3)),
        ("trim", 17, Tail()),
        ("pad", 5, Tail(kept=5, padded=12)),
    ],
)
def test_tails_by_hand(tail: str, count: int, expected: Tail) -> None:
    policy = WindowPolicy.model_validate({"frames": 17, "tail": tail})
    assert plan_tail(count, policy, LENGTHS) == expected


def test_overlapping_tails_by_hand() -> None:
    """17 frames every 8: with 20 frames the next window would hold frames 8..19, of which 17..19 are new."""
    policy = WindowPolicy(frames=17, window_stride=8, tail="trim")
    assert plan_tail(20, policy, LENGTHS) == Tail(dropped=3)  # frames 8..16 are all in the first window
    assert plan_tail(21, policy, LENGTHS) == Tail(kept=13)
    assert plan_tail(20, policy.model_copy(update={"tail": "pad"}), LENGTHS) == Tail(kept=12, padded=5)
    assert plan_tail(17, policy, LENGTHS) == Tail()


def test_tails_of_a_vae_with_a_rule_of_its_own() -> None:
    """Open-Sora's micro clips of 17 frames, without overlap: 18 is a length, 21 is none."""
    policy = WindowPolicy(frames=34, tail="trim")
    lengths = valid_lengths(policy, lambda number: number % 17 in (0, 1, 5, 9, 13))
    assert lengths == (1, 5, 9, 13, 17, 18, 22, 26, 30, 34)
    assert plan_tail(34 + 21, policy, lengths) == Tail(kept=18, trimmed=3)
    assert plan_tail(4, policy, (5, 9, 34)) == Tail(dropped=4)
    assert plan_tail(8 + 3, WindowPolicy(frames=5, window_stride=8, tail="trim"), (5,)) == Tail(dropped=3)


def test_window_length_must_be_one_that_the_vae_takes() -> None:
    check_window_length(WindowPolicy(frames=17), LENGTHS)
    check_window_length(WindowPolicy(frames=1), LENGTHS)
    with pytest.raises(ConfigError, match="got 16; the longest below is 13"):
        check_window_length(WindowPolicy(frames=16), LENGTHS)
