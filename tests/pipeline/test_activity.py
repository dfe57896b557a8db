"""What an encoder does or waits for, second by second."""

from __future__ import annotations

from contextlib import ExitStack

import pytest

from pipeline.activity import ENCODE, SHARD, STATES, EncoderActivity


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_idle_seconds_have_a_reason() -> None:
    clock = Hand()
    activity = EncoderActivity(clock)
    with ExitStack() as first, ExitStack() as second:
        clock.now = 1.0  # no shard yet
        first.enter_context(activity.during(SHARD))
        with activity.during("wait for decode"):
            clock.now = 3.0
        with activity.during(ENCODE):
            second.enter_context(activity.during(SHARD))
            second.enter_context(activity.during("wait for decode"))
            clock.now = 6.0  # busy, whatever the other shard waits for
        with activity.during("store"):
            clock.now = 8.0  # one is stored, and the other still decodes: that is what is waited for
            second.close()
            clock.now = 9.0
        clock.now = 9.5
    figures = activity.figures()
    assert {name: figures[f"state.{name}"] for name in STATES} == pytest.approx(
        {"no_shard": 1.0, "decode": 4.0, "encode": 3.0, "store": 1.0, "other": 0.5}
    )
    assert sum(figures[f"state.{name}"] for name in STATES) == clock.now


def test_counts_are_among_the_figures() -> None:
    activity = EncoderActivity(Hand())
    activity.count("rejections.timeout", 2)
    activity.count("rejections.timeout")
    assert activity.figures()["rejections.timeout"] == 3
