"""Make a small, real input for a first run: three video2dataset shards and a table, from nine real clips.

    python jobs/make_demo_data.py --output data/demo

writes OUTPUT/shards/00000.tar ... 00002.tar with their sidecars, OUTPUT/clips.csv with the files it names in
OUTPUT/clips/, and OUTPUT/demo.json, last: what was written, with hashes. If that record still holds, nothing is
done. Besides good samples the shards hold what every scraped dataset holds: failed downloads, a web page with the
name of a video, truncated files, sound without a picture, a still. Each sample's metadata says what
it is (`demo_condition`), so that a run's rejections can be compared with it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.real_clips import LICENCE_NOTE, REAL_CLIPS, fetch_real_clips
from jobs.remux import copy_span
from jobs.v2d_shards import FAILED_TO_DOWNLOAD, CutClip, DownloadedVideo, write_shard
from pipeline.errors import ConfigError, PipelineError

RECORD = "demo.json"
RECIPE = 1
"""Raised when what is written changes, so that a folder of an older recipe is made anew."""
GOOD = "good"
SHORT = ("eight_frames", "one_frame")
"""Whole files, but shorter than most windows."""

CARPHONE = "A man in a dark suit and a red bow tie talks in a moving vehicle"
WOMAN = "Close-up of a woman with long brown hair in front of a dark wall"
MAN = "A man in a black shirt smiles in front of a white door"
TITLE = "The orange title Caminandes rises before a blue cartoon sky with clouds"
RABBIT = "A big grey cartoon rabbit crawls out of its burrow, stands up and stretches on a green meadow"

WOMAN_CUTS = (0.0, 3.003, 6.006, 9.009, 12.012, 15.015, 18.018, 19.685)
"""Seconds: keyframes and the end of one take. The cutter takes whole groups of pictures."""
BIKES_SHOTS = (
    (0.0, 1.2, "The white roof of a bus passes, seen from straight above"),
    (1.2, 3.04, "A man in a suit passes before waiting cars, then a taxi sign drives through the picture"),
    (3.04, 5.48, "Cars pass a dark van, then a waiting cyclist with a helmet comes into view"),
    (5.48, 7.48, "Cars drive along a street of old houses behind a green railing with a bicycle"),
    (7.48, 9.68, "A pedestrian walks past a bicycle that leans on a wall by a cobbled pavement"),
)
BIKES_SHORT = (9.68, 10.0, "Close-up of the pedal of a parked white bicycle")
WEB_PAGE = b"""<!DOCTYPE html>
<html><head><title>Sign in</title></head>
<body><p>This video is not available in your region. Please sign in to continue.</p></body></html>
"""


def build_shards(clips: Mapping[str, Path]) -> list[list[DownloadedVideo]]:
    """The rows of the three shards: the first two from tables with a `clips` column, the third from one without."""
    return [_talking_people(clips), _streets(clips), _whole_files(clips)]


def _talking_people(clips: Mapping[str, Path]) -> list[DownloadedVideo]:
    takes = tuple(_cut(clips["WolfgangLanger_Pexels.mp4"], *span) for span in itertools.pairwise(WOMAN_CUTS))
    return [
        _row("WolfgangLanger_Pexels.mp4", WOMAN, clips=takes),
        _failed("HTTP Error 403: Forbidden", clips=(CutClip(start=12.0, stop=21.5),)),
        _row("carphone_pristine.mp4", CARPHONE, clips=(_cut(clips["carphone_pristine.mp4"], 0.0, 4.004),)),
    ]


def _streets(clips: Mapping[str, Path]) -> list[DownloadedVideo]:
    """One row per shot, as tables with a caption per shot have it, and two clips of variable frame rate."""

    def shot(start: float, stop: float, caption: str, condition: str = GOOD) -> DownloadedVideo:
        return _row("bikes.mp4", caption, condition, clips=(_cut(clips["bikes.mp4"], start, stop),))

    def whole(name: str, stop: float, caption: str) -> DownloadedVideo:
        return _row(name, caption, clips=(_cut(clips[name], 0.0, stop),))

    return [
        *(shot(*described) for described in BIKES_SHOTS),
        shot(*BIKES_SHORT, condition="eight_frames"),
        whole("face_noface.mov", 6.402, f"{MAN}, then: {TITLE[0].lower()}{TITLE[1:]}"),
        whole("noface_face.mov", 6.379, f"{TITLE}, then: {MAN[0].lower()}{MAN[1:]}"),
    ]


def _whole_files(clips: Mapping[str, Path]) -> list[DownloadedVideo]:
    """Files as they were downloaded, whatever they are."""
    man = clips["single_face.mp4"].read_bytes()
    index_first = copy_span(clips["single_face.mp4"])
    still = copy_span(clips["no_face.mp4"], max_packets=1)
    sound = copy_span(clips["bigbuckbunny.mp4"], stop=1.0, kind="audio")
    return [
        _row("bigbuckbunny.mp4", RABBIT, video=clips["bigbuckbunny.mp4"].read_bytes()),
        _row("single_face.mp4", MAN, video=man),
        # its index is at the end, and gone
        _row("single_face.mp4", MAN, "truncated_index", video=man[: len(man) // 2]),
        # its index is at the start: half of the frames can be decoded
        _row("single_face.mp4", MAN, "truncated_frames", video=index_first[: len(index_first) // 2]),
        _failed("HTTP Error 404: Not Found"),
        _row("no_face.mp4", TITLE, video=clips["no_face.mp4"].read_bytes()),
        _row("bigbuckbunny.mp4", RABBIT, "sound_only", video=sound),
        _row("bikes.mp4", BIKES_SHOTS[0][2], "web_page", video=WEB_PAGE),
        _row("carphone_distorted.mp4", CARPHONE, video=clips["carphone_distorted.mp4"].read_bytes()),
        _row("no_face.mp4", "A blue cartoon sky with clouds", "one_frame", video=still),
    ]


def _cut(path: Path, start: float, stop: float) -> CutClip:
    return CutClip(start=start, stop=stop, video=copy_span(path, start=start, stop=stop))


def _row(
    name: str,
    caption: str,
    condition: str = GOOD,
    *,
    video: bytes | None = None,
    clips: tuple[CutClip, ...] | None = None,
) -> DownloadedVideo:
    columns = {"demo_condition": condition}
    return DownloadedVideo(caption=caption, url=REAL_CLIPS[name].purl, video=video, clips=clips, columns=columns)


def _failed(message: str, clips: tuple[CutClip, ...] | None = None) -> DownloadedVideo:
    return DownloadedVideo(
        caption="A video that was gone when it was downloaded",
        url="https://videos.example/gone.mp4",
        clips=clips,
        status=FAILED_TO_DOWNLOAD,
        error_message=message,
        columns={"demo_condition": FAILED_TO_DOWNLOAD},
    )


def build_table(clips: Mapping[str, Path]) -> dict[str, bytes]:
    """clips.csv and the files its rows name, by path."""
    rows = [(name.removesuffix(".mp4"), clips[name].read_bytes(), caption) for name, caption in _TABLE_FILES]
    for number, (start, stop, caption) in enumerate(BIKES_SHOTS[1:3], start=1):
        rows.append((f"bikes_shot_{number}", copy_span(clips["bikes.mp4"], start=start, stop=stop), caption))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("uri", "videoid", "caption"))
    writer.writerows((f"clips/{name}.mp4", name, caption) for name, _, caption in rows)
    return {"clips.csv": text.getvalue().encode(), **{f"clips/{name}.mp4": video for name, video, _ in rows}}


_TABLE_FILES = (
    ("carphone_pristine.mp4", CARPHONE),
    ("carphone_distorted.mp4", f"{CARPHONE}, heavily compressed"),
    ("single_face.mp4", MAN),
    ("no_face.mp4", TITLE),
)


def make_demo_data(output: Path, console: Console) -> bool:
    """Write the demo's input under `output`; False if it was in place already.

    ConfigError if `output` is a file; SourceError if the clips cannot be downloaded.
    """
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output: expected a folder, {output} is a file")
    if (record := read_record(output)) is not None:
        console.print(f"demo data is in place in [bold]{output}[/]: nothing to do")
        _summarize(output, record, console)
        return False
    clips = fetch_real_clips(console=console)
    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD).unlink(missing_ok=True)
    with (
        console.status("cutting clips and writing shards"),
        tempfile.TemporaryDirectory(dir=output, prefix=".new-") as scratch,
    ):
        record = _write_all(Path(scratch), clips)
        for name in record["files"]:
            (output / name).parent.mkdir(exist_ok=True)
            (Path(scratch) / name).replace(output / name)
        (Path(scratch) / RECORD).write_text(json.dumps(record, indent=2))
        (Path(scratch) / RECORD).replace(output / RECORD)
    _summarize(output, record, console)
    return True


def read_record(output: Path) -> dict[str, Any] | None:
    """The record of an earlier run if it is of this recipe and every file is as it says; else None."""
    try:
        record = json.loads((output / RECORD).read_text())
        if record["recipe"] == RECIPE and all(_sha256(output / name) == sha for name, sha in record["files"].items()):
            return record
    except (FileNotFoundError, ValueError, KeyError):
        pass  # never finished, or changed since: it is made anew
    return None


def _write_all(folder: Path, clips: Mapping[str, Path]) -> dict[str, Any]:
    (folder / "shards").mkdir()
    (folder / "clips").mkdir()
    shards = []
    for number, videos in enumerate(build_shards(clips)):
        written = write_shard(folder / "shards", number, videos)
        conditions = Counter(video.columns["demo_condition"] for video in videos for _ in video.clips or (None,))
        shards.append({"name": written.tar.name, "bytes": written.tar.stat().st_size, "conditions": conditions})
    for name, data in build_table(clips).items():
        (folder / name).write_bytes(data)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {"recipe": RECIPE, "shards": shards, "files": {name: _sha256(folder / name) for name in names}}


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _summarize(output: Path, record: dict[str, Any], console: Console) -> None:
    table = Table("shard", title=f"video2dataset shards in {output / 'shards'}", title_justify="left")
    for heading in ("samples", "good", "short", "damaged", "failed downloads", "MB"):
        table.add_column(heading, justify="right")
    totals = [0.0] * 6
    for shard in record["shards"]:
        counts = Counter(shard["conditions"])
        good, short, failed = counts[GOOD], sum(counts[name] for name in SHORT), counts[FAILED_TO_DOWNLOAD]
        damaged = counts.total() - good - short - failed
        numbers = [counts.total(), good, short, damaged, failed, shard["bytes"] / 1e6]
        totals = [total + number for total, number in zip(totals, numbers, strict=True)]
        table.add_row(shard["name"], *_cells(numbers))
    table.add_section()
    table.add_row("all", *_cells(totals), style="bold")
    console.print(table)
    plain = sum(name.startswith("clips/") for name in record["files"])
    console.print(f"a table of {plain} plain files: {output / 'clips.csv'}")
    console.print(LICENCE_NOTE, style="dim")


def _cells(numbers: list[float]) -> list[str]:
    *counts, megabytes = numbers
    return [*(f"{count:.0f}" for count in counts), f"{megabytes:.1f}"]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the shards and the table.")] = Path("data/demo"),
) -> None:
    """Make a small, real input for a first run: three video2dataset shards and a table, from nine real clips."""
    console = Console()
    try:
        make_demo_data(output, console)
    except PipelineError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


if __name__ == "__main__":
    typer.run(main)
