"""What the terminal shows while a run goes on: figures that mean what they say."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from rich.console import Console

from jobs.console import RunDisplay
from pipeline.dataflow import ActorShape
from pipeline.documents import Counts


def shape(num_actors: int) -> ActorShape:
    return ActorShape(num_actors=num_actors, num_gpus=0, decode_children=1, encode_threads=2, num_cpus=2)


def plan(todo: int, total: int) -> Any:
    return SimpleNamespace(todo=range(todo), shards=range(total))


def shown_while(report: Any, num_actors: int = 2) -> str:
    console = Console(record=True, width=200, force_terminal=True, highlight=False)
    display = RunDisplay(console)
    with display.encoding(plan(3, 3), shape(num_actors)):
        report(display)
    return console.export_text()


def test_frames_are_those_of_whole_windows() -> None:
    """Frames run through the VAE count filler and shared frames: more than anybody gets."""
    text = shown_while(lambda display: display.progress({"a": {"frames": 900, "window_frames": 170}}))
    assert "170 frames" in text
    assert "900" not in text


def test_encoders_that_are_not_up_are_named() -> None:
    text = shown_while(lambda display: display.progress({"a": {"window_frames": 17}}))
    assert "17 frames, 1 encoder to come up" in text
    assert "starting the encoders" in shown_while(lambda display: display.progress({"a": {"window_frames": 0}}))


def test_a_run_shorter_than_a_report_still_shows_its_frames() -> None:
    receipt = cast(Any, SimpleNamespace(counts=Counts(samples=1, clips_encoded=1, frames_stored=34)))
    text = shown_while(lambda display: display.committed(receipt), num_actors=1)
    assert "34 frames" in text
    assert "1 encode actor (2 CPU threads, 1 decode process)" in text


def test_an_interrupted_run_says_what_stands() -> None:
    console = Console(record=True, width=200)
    RunDisplay(console).stopped(plan(3, 5), 1)
    assert "stopped: 3 of 5 shards are committed" in console.export_text()
