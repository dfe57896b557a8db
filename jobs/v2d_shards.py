"""Writing shards as video2dataset writes them: `00012.tar`, its sidecar `00012.parquet` and `00012_stats.json`.

Followed to the letter, traps included: a sample is KEY.json, KEY.mp4, KEY.txt in that order (its writer sorts the
extensions); a video that failed is in the tar and in the sidecar too, as json and txt with a status that starts with
"failed_to_" and no mp4; nothing checks that what was downloaded is a video. Keys are the shard's number in 5 digits
and the row's in 4; a clip cut out of a row's video adds `_00000`.
Two things differ, so that the same input gives the same bytes: modification times are 0, and so are the times in the
statistics.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

ROWS_PER_SHARD = 10_000
FAILED_TO_DOWNLOAD = "failed_to_download"
FAILED_TO_SUBSAMPLE = "failed_to_subsample"


@dataclass(frozen=True, slots=True, kw_only=True)
class CutClip:
    """A span of a row's video, in seconds, and its bytes; None where the video never came."""

    start: float
    stop: float
    video: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadedVideo:
    """One row of video2dataset's input table and what became of it. ValueError if the parts contradict each other."""

    caption: str
    url: str = ""
    video: bytes | None = None
    clips: tuple[CutClip, ...] | None = None
    """The table's `clips` column: a sample for each. None for a table without that column."""
    status: str = "success"
    error_message: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    """Further columns of the table (`save_additional_columns`), the same for all rows of a shard."""

    def __post_init__(self) -> None:
        succeeded = self.status == "success"
        payloads = [self.video] if self.clips is None else [clip.video for clip in self.clips]
        if not succeeded and self.status not in (FAILED_TO_DOWNLOAD, FAILED_TO_SUBSAMPLE):
            raise ValueError(f"expected status success or failed_to_..., got {self.status!r}")
        if self.clips is not None and self.video is not None:
            raise ValueError("expected a video or clips cut out of it, got both")
        if any((payload is not None) != succeeded for payload in payloads) or not payloads:
            raise ValueError(f"status {self.status!r} expects bytes {'for all' if succeeded else 'for none'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardFiles:
    """What `write_shard` wrote, and the keys in order."""

    tar: Path
    sidecar: Path
    stats: Path
    keys: tuple[str, ...]


def sample_key(shard_number: int, row: int, clip: int | None = None) -> str:
    """sample_key(12, 3) is "000120003", with clip 1 "000120003_00001"."""
    key = f"{shard_number * ROWS_PER_SHARD + row:09d}"
    return key if clip is None else f"{key}_{clip:05d}"


def write_shard(folder: Path, shard_number: int, videos: Sequence[DownloadedVideo]) -> ShardFiles:
    """Write one shard's three files into an existing folder.

    ValueError for no rows or too many, and for rows with different columns: they come from one table.
    """
    _check(videos)
    stem = folder / f"{shard_number:05d}"
    files = {suffix: stem.with_name(stem.name + suffix) for suffix in (".tar", ".parquet", "_stats.json")}
    rows: list[dict[str, Any]] = []
    with files[".tar"].open("wb") as file, TarWriter(file, mtime=0) as tar:
        for number, video in enumerate(videos):
            for meta, payload in _samples(video, shard_number, number):
                members = {"__key__": meta["key"], "txt": video.caption, "json": json.dumps(meta, indent=4)}
                tar.write(members if payload is None else {**members, "mp4": payload})
                rows.append(meta)
    schema = _schema(videos[0])
    pq.write_table(pa.Table.from_pylist(rows, schema), files[".parquet"])
    files["_stats.json"].write_text(json.dumps(_stats(videos), indent=4))
    keys = tuple(row["key"] for row in rows)
    return ShardFiles(tar=files[".tar"], sidecar=files[".parquet"], stats=files["_stats.json"], keys=keys)


def _check(videos: Sequence[DownloadedVideo]) -> None:
    if not 0 < len(videos) <= ROWS_PER_SHARD:
        raise ValueError(f"expected 1 to {ROWS_PER_SHARD} rows in a shard, got {len(videos)}")
    tables = {(tuple(video.columns), video.clips is not None) for video in videos}
    if len(tables) > 1:
        raise ValueError(f"expected rows of one table, got different columns: {sorted(tables)}")


def _samples(video: DownloadedVideo, shard_number: int, row: int) -> list[tuple[dict[str, Any], bytes | None]]:
    """The row's samples: metadata (of the json and the sidecar) and bytes."""
    spans = [[clip.start, clip.stop] for clip in video.clips or ()]
    meta = {
        **video.columns,
        **({"clips": spans} if video.clips is not None else {}),
        "caption": video.caption,
        "url": video.url,
        "key": sample_key(shard_number, row),
        "status": video.status,
        "error_message": video.error_message,
        "yt_meta_dict": None,
    }
    if video.clips is None or video.status != "success":
        return [(meta, video.video)]
    del meta["clips"]  # the cutter takes it out and puts the clip's own span in, at the end
    return [
        ({**meta, "key": sample_key(shard_number, row, number), "clips": [spans[number]]}, clip.video)
        for number, clip in enumerate(video.clips)
    ]


def _schema(video: DownloadedVideo) -> pa.Schema:
    """The input table's columns, then what video2dataset adds. yt_meta_dict is in the json alone."""
    fields = [pa.field(name, pa.string()) for name in video.columns]
    if video.clips is not None:
        fields.append(pa.field("clips", pa.list_(pa.list_(pa.float64()))))
    added = ("caption", "url", "key", "status", "error_message")
    return pa.schema([*fields, *(pa.field(name, pa.string()) for name in added)])


def _stats(videos: Sequence[DownloadedVideo]) -> dict[str, Any]:
    """Counts are of rows, not of the clips cut out of them."""
    statuses = Counter(video.status for video in videos)
    payloads = [payload for video in videos for payload in (video.video, *(c.video for c in video.clips or ()))]
    said = Counter(video.error_message or video.status for video in videos)
    return {
        "count": len(videos),
        "successes": statuses["success"],
        FAILED_TO_DOWNLOAD: statuses[FAILED_TO_DOWNLOAD],
        FAILED_TO_SUBSAMPLE: statuses[FAILED_TO_SUBSAMPLE],
        "duration": 0.0,
        "bytes_downloaded": sum(len(payload) for payload in payloads if payload is not None),
        "start_time": 0.0,
        "end_time": 0.0,
        "status_dict": dict(said),
    }
