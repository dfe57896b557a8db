"""How fast each decode backend is on real clips, in this process and in child processes.

    python jobs/bench_decode.py --rounds 5

A round decodes a clip in every place, one place after the other, so that a noisy machine is noisy for all; ratios
are medians over the rounds. Each measurement decodes as many copies of the clip as take about a second. Windows of
17 frames at 256 x 256, all of a clip's frames.
"""

from __future__ import annotations

import hashlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer

from jobs.bench_report import BenchTable, machine, ratio_text
from jobs.real_clips import fetch_real_clips
from pipeline.decode.blob import Blob
from pipeline.decode.clips import decode_clip
from pipeline.decode.pool import ClipDone, DecodePool
from pipeline.policies import BackendName, DecodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Clip

CLIPS = ("carphone_pristine.mp4", "bikes.mp4", "WolfgangLanger_Pexels.mp4", "bigbuckbunny.mp4")
BACKENDS: tuple[BackendName, ...] = ("pyav", "decord")
WINDOWS = WindowPolicy(frames=17, tail="trim")
RESIZE = ResizePolicy(buckets=((256, 256),))
LENGTHS = (1, 5, 9, 13, 17)


Place = Callable[[bytes, int], float]
"""Decodes so many copies of a video; frames/s."""


def bench_decode(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long one measurement takes.")] = 1.0,
    clip: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(CLIPS)}.")] = None,
) -> None:
    """Frames per second per backend, in process and in children."""
    print(machine())
    videos = {name: path.read_bytes() for name, path in fetch_real_clips().items() if name in (clip or CLIPS)}
    table = BenchTable(
        f"decode to 256 x 256, frames/s, median of {rounds} rounds",
        ("clip", "backend", "in process", "1 child", "2 children", "1 child / in process"),
        labels=2,
    )
    for backend in BACKENDS:
        with ExitStack() as stack:
            places = _places(backend, stack)
            for name, video in videos.items():
                rates = measure(video, places, rounds, seconds)
                medians = (f"{statistics.median(of_place):.0f}" for of_place in rates)
                table.add(name, backend, *medians, ratio_text(rates[1], rates[0]))
    table.rows.sort()
    print(table)


def _places(backend: BackendName, stack: ExitStack) -> tuple[Place, ...]:
    """In this process, in one child, in two. The children live as long as the stack."""

    def in_process(video: bytes, copies: int) -> float:
        return _in_process(video, backend, copies)

    def in_pool(pool: DecodePool) -> Place:
        return lambda video, copies: decode_in_pool(pool, video, copies)

    pools = [stack.enter_context(DecodePool(DecodePolicy(backends=(backend,)), children)) for children in (1, 2)]
    return in_process, *(in_pool(pool) for pool in pools)


def measure(video: bytes, places: tuple[Place, ...], rounds: int, seconds: float) -> list[list[float]]:
    """Frames/s per place and round."""
    started = time.perf_counter()
    places[0](video, 1)
    copies = math.ceil(seconds / (time.perf_counter() - started))
    for place in places[1:]:
        place(video, 1)  # a child imports its decoder with its first clip
    rates: list[list[float]] = [[] for _ in places]
    for _, (place, of_place) in product(range(rounds), list(zip(places, rates, strict=True))):
        of_place.append(place(video, copies))
    return rates


def _in_process(video: bytes, backend: BackendName, repeats: int) -> float:
    frames, started = 0, time.perf_counter()
    for _ in range(repeats):
        with Blob.from_bytes(video) as blob:
            for window in decode_clip(blob.path, backend, WINDOWS, RESIZE, lengths=LENGTHS):
                frames += window.to_window("clip").shape[0]
    return frames / (time.perf_counter() - started)


def decode_in_pool(pool: DecodePool, video: bytes, repeats: int) -> float:
    """Frames/s of so many copies of a video; who asks for it takes its windows and does nothing with them."""
    frames, started = 0, time.perf_counter()
    for event in pool.decode(_clips(video, repeats), WINDOWS, RESIZE, LENGTHS):
        if isinstance(event, ClipDone):
            assert event.summary is not None, event.rejection
            frames += event.summary.sampled_frames - event.summary.trimmed_frames
    return frames / (time.perf_counter() - started)


def _clips(video: bytes, repeats: int) -> Iterator[Clip]:
    sha256 = hashlib.sha256(video).hexdigest()
    for number in range(repeats):
        yield Clip(
            key=str(number),
            shard_id="bench",
            video=Blob.from_bytes(video),
            video_sha256=sha256,
            file_name="clip",
            caption="",
            metadata={},
        )


if __name__ == "__main__":
    typer.run(bench_decode)
