"""How fast each decode backend is on real clips, in this process and in child processes.

    python jobs/bench_decode.py --rounds 3

Every figure is the best of the rounds, which are interleaved so that a noisy machine is noisy for all; compare
columns of one run, not of two. Windows of 17 frames at 256 x 256, all of a clip's frames.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

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


def bench_decode(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds; the best of each counts.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, help="Copies of a clip that are decoded in one measurement.")] = 2,
) -> None:
    """Frames per second per backend, in process and in children."""
    clips = fetch_real_clips()
    best: dict[tuple[str, BackendName, str], float] = {}
    for _, name, backend in product(range(rounds), CLIPS, BACKENDS):
        video = clips[name].read_bytes()
        for place, rate in _measure(video, backend, repeats):
            key = name, backend, place
            best[key] = max(best.get(key, 0.0), rate)
    table = Table(title=f"frames/s at 256 x 256, best of {rounds}; {platform.machine()}, {os.cpu_count()} cores")
    places = ("in process", "1 child", "2 children")
    for heading in ("clip", "backend", *places, "1 child / in process"):
        table.add_column(heading, justify="left" if heading in ("clip", "backend") else "right")
    for name, backend in product(CLIPS, BACKENDS):
        rates = [best[name, backend, place] for place in places]
        table.add_row(name, backend, *(f"{rate:.0f}" for rate in rates), f"{rates[1] / rates[0]:.2f}")
    Console().print(table)


def _measure(video: bytes, backend: BackendName, repeats: int) -> Iterator[tuple[str, float]]:
    yield "in process", _in_process(video, backend, repeats)
    for children in (1, 2):
        with DecodePool(DecodePolicy(backends=(backend,)), children) as pool:
            yield f"{children} child" + ("ren" if children > 1 else ""), _in_pool(pool, video, repeats)


def _in_process(video: bytes, backend: BackendName, repeats: int) -> float:
    frames, started = 0, time.perf_counter()
    for _ in range(repeats):
        with Blob.from_bytes(video) as blob:
            for window in decode_clip(blob.path, backend, WINDOWS, RESIZE, lengths=LENGTHS):
                frames += window.to_window("clip").shape[0]
    return frames / (time.perf_counter() - started)


def _in_pool(pool: DecodePool, video: bytes, repeats: int) -> float:
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
