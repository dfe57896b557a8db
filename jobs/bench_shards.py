"""Shards of real clips for the benchmarks, as many and as large as they need."""

from __future__ import annotations

import itertools
from pathlib import Path

from jobs.make_demo_data import BIKES_SHOTS, MAN
from jobs.real_clips import fetch_real_clips
from jobs.remux import copy_span
from jobs.v2d_shards import DownloadedVideo, write_shard


def real_shots() -> list[DownloadedVideo]:
    """Five shots that decode well: 30, 46, 50 and 55 frames of 640 x 272, 72 frames of 640 x 360."""
    clips = fetch_real_clips()
    shots = [BIKES_SHOTS[number] for number in (0, 1, 3, 4)]
    cuts = [(copy_span(clips["bikes.mp4"], start=start, stop=stop), caption) for start, stop, caption in shots]
    cuts.append((clips["single_face.mp4"].read_bytes(), MAN))
    return [DownloadedVideo(video=video, caption=caption) for video, caption in cuts]


def write_shards(folder: Path, videos: list[DownloadedVideo], *, num_shards: int, clips_per_shard: int) -> list[Path]:
    """Tars 00000.tar and so on with the same clips in turn, the same in each; those that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    clips = list(itertools.islice(itertools.cycle(videos), clips_per_shard))
    tars = [folder / f"{number:05d}.tar" for number in range(num_shards)]
    for number, tar in enumerate(tars):
        if not tar.exists():
            write_shard(folder, number, clips)
    return tars
