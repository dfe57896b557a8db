"""How much memory an encode actor needs: against the length of its clips, and against how many shards it has done.

    python jobs/bench_memory.py

Each row is a process of its own that does what an encode actor does: one VAE, one pool of decode children, two
shards at a time. Peak is its largest resident memory; "above start" is that less what it had with the model loaded.
The decode children's column is the largest of them. Both should not grow down the table.
"""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer

from jobs.bench_report import BenchTable, machine, mib_text, peak_rss_mib, reset_peak_rss, rss_mib
from jobs.bench_shards import real_shots, write_shards
from jobs.config import EncodeConfig
from jobs.real_clips import fetch_real_clips
from jobs.v2d_shards import DownloadedVideo
from pipeline.checkpoints import load_source
from pipeline.dataflow import CALLS_PER_ACTOR
from pipeline.decode.pool import DecodePool
from pipeline.encoder import TileEncoder
from pipeline.run import plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder

LENGTHS = (33, 129, 513, 1025)
SHARDS = (1, 4, 16)
LONG_CLIP = "WolfgangLanger_Pexels.mp4"


@dataclass(frozen=True, slots=True)
class Memory:
    """MiB; None where the kernel does not say."""

    at_start: float | None
    peak: float | None
    child_peak: float | None
    frames: int
    """Stored in all shards."""


def bench_memory(
    lengths: Annotated[list[int] | None, typer.Option(help="Frames of the clips.")] = None,
    shards: Annotated[list[int] | None, typer.Option(help="Numbers of shards.")] = None,
    size: Annotated[int, typer.Option(min=8, help="Height and width of the windows.")] = 64,
) -> None:
    """Peak memory of an encode actor over clip length and over number of shards."""
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        print(length_table(Path(folder), lengths or LENGTHS, size), flush=True)
        print(shard_table(Path(folder), shards or SHARDS, size), flush=True)


def length_table(folder: Path, lengths: Sequence[int], size: int) -> BenchTable:
    """One shard of three clips of each length, in windows of 33 frames."""
    table = BenchTable(f"memory over clip length, windows of 33 x {size} x {size}", ("frames in a clip", *_COLUMNS))
    for length in lengths:
        video = DownloadedVideo(caption="long", video=clip_of_length(length, folder))
        tars = write_shards(folder / f"length-{length}", [video], num_shards=1, clips_per_shard=3)
        table.add(str(length), *_cells(measure(_config(tars, folder / f"out-{length}", frames=33, size=size))))
    return table


def shard_table(folder: Path, numbers: Sequence[int], size: int) -> BenchTable:
    """Shards of five clips, in windows of 17 frames."""
    table = BenchTable(f"memory over shards, windows of 17 x {size} x {size}", ("shards", *_COLUMNS))
    videos = real_shots()
    for number in numbers:
        tars = write_shards(folder / "shards", videos, num_shards=number, clips_per_shard=len(videos))
        table.add(str(number), *_cells(measure(_config(tars, folder / f"out-{number}-shards", frames=17, size=size))))
    return table


_COLUMNS = ("frames stored", "at start MiB", "peak MiB", "above start MiB", "decode child peak MiB")


def _cells(memory: Memory) -> tuple[str, ...]:
    above = None if memory.peak is None or memory.at_start is None else memory.peak - memory.at_start
    return (str(memory.frames), *map(mib_text, (memory.at_start, memory.peak, above, memory.child_peak)))


def clip_of_length(num_frames: int, folder: Path) -> bytes:
    """A real clip over and over, encoded anew to exactly so many frames. SystemExit without imageio-ffmpeg."""
    try:
        from imageio_ffmpeg import get_ffmpeg_exe
    except ModuleNotFoundError as error:
        raise SystemExit("bench_memory makes its clips with imageio-ffmpeg: pip install imageio-ffmpeg") from error
    clip, made = fetch_real_clips()[LONG_CLIP], folder / f"{num_frames}.mp4"
    loop = ["-stream_loop", "-1", "-i", str(clip), "-map", "0:v", "-frames:v", str(num_frames)]
    coding = ["-vf", "scale=320:-2", "-c:v", "libx264", "-preset", "ultrafast", "-threads", "1"]
    subprocess.run(
        [get_ffmpeg_exe(), "-v", "error", "-y", *loop, *coding, str(made)], check=True, stdin=subprocess.DEVNULL
    )
    return made.read_bytes()


def _config(tars: list[Path], output: Path, *, frames: int, size: int) -> EncodeConfig:
    return EncodeConfig.model_validate(
        {
            "source": {"kind": "webdataset", "urls": [str(tar) for tar in tars]},
            "output": {"url": str(output)},
            "vae": {"spec": "cvvae-sd21-tiny", "seed": 0},
            "windows": {"frames": frames},
            "resize": {"buckets": [[size, size]]},
            "encode": {"batch_pixels": 2 * 17 * size * size},
        }
    )


def measure(config: EncodeConfig) -> Memory:
    """Encode the config's shards in a new process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_encode, config).result()


def _encode(config: EncodeConfig) -> Memory:
    plan = plan_run(config, config.model_dump(mode="json"))
    tiles = TileEncoder(load_source(config.vae), config.encode, torch.device("cpu"))
    with DecodePool(config.decode, num_children=2) as pool, ThreadPoolExecutor(CALLS_PER_ACTOR) as calls:
        encoder = ShardEncoder(plan.job(), tiles, pool, Scratch())
        at_start = rss_mib()
        reset_peak_rss()
        stored = list(calls.map(encoder.run, plan.todo))
        children = [peak for pid in pool.child_pids() if (peak := peak_rss_mib(pid)) is not None]
        return Memory(
            at_start=at_start,
            peak=peak_rss_mib(),
            child_peak=max(children, default=None),
            frames=sum(one.receipt.counts.frames_stored for one in stored),
        )


if __name__ == "__main__":
    typer.run(bench_memory)
