"""The demo's input, made for real: video2dataset's layout, good samples that open, bad ones that are bad as named."""

from __future__ import annotations

import csv
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import av
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from jobs.make_demo_data import GOOD, RECORD, make_demo_data, read_record
from jobs.v2d_shards import FAILED_TO_DOWNLOAD
from pipeline.errors import ConfigError

PROJECT = Path(__file__).resolve().parents[2]
SHARDS = ("00000", "00001", "00002")


@pytest.fixture(scope="module")
def demo(tmp_path_factory, real_clips) -> Path:
    """Made the way a user makes it: as a script, from the project's folder."""
    output = tmp_path_factory.mktemp("demo") / "input"
    command = [sys.executable, "jobs/make_demo_data.py", "--output", str(output)]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "do not pass them on" in " ".join(done.stdout.split())
    return output


def members(tar: Path) -> dict[str, bytes]:
    """Contents by member name, in the tar's order."""
    with tarfile.open(tar) as file:
        return {member.name: file.extractfile(member).read() for member in file}


def samples(demo: Path) -> dict[str, tuple[dict, bytes | None]]:
    """Metadata and video by key, of all shards."""
    found = {}
    for stem in SHARDS:
        content = members(demo / "shards" / f"{stem}.tar")
        keys = [name.removesuffix(".json") for name in content if name.endswith(".json")]
        found |= {key: (json.loads(content[f"{key}.json"]), content.get(f"{key}.mp4")) for key in keys}
    return found


def count_frames(video: bytes) -> int:
    with av.open(io.BytesIO(video)) as container:
        return sum(1 for _ in container.decode(video=0))


def test_tar_members_are_video2datasets(demo):
    for stem in SHARDS:
        names = list(members(demo / "shards" / f"{stem}.tar"))
        sidecar = pq.read_table(demo / "shards" / f"{stem}.parquet").to_pylist()
        expected = []
        for row in sidecar:
            extensions = ("json", "mp4", "txt") if row["status"] == "success" else ("json", "txt")
            expected += [f"{row['key']}.{extension}" for extension in extensions]
        assert names == expected
        assert all(row["key"].startswith(stem) for row in sidecar)


def test_sidecar_and_json_agree(demo):
    found = samples(demo)
    rows = [row for stem in SHARDS for row in pq.read_table(demo / "shards" / f"{stem}.parquet").to_pylist()]
    assert [row["key"] for row in rows] == list(found)
    for row in rows:
        meta, _ = found[row["key"]]
        assert meta.pop("yt_meta_dict") is None
        assert meta == row


def test_sidecar_columns(demo):
    added = ["caption", "url", "key", "status", "error_message"]
    names = [pq.read_schema(demo / "shards" / f"{stem}.parquet").names for stem in SHARDS]
    with_clips = ["demo_condition", "clips", *added]
    assert names == [with_clips, with_clips, ["demo_condition", *added]]


def test_statistics_count_rows(demo):
    stats = [json.loads((demo / "shards" / f"{stem}_stats.json").read_text()) for stem in SHARDS]
    assert [(s["count"], s["successes"], s["failed_to_download"]) for s in stats] == [
        (3, 2, 1),
        (8, 8, 0),
        (10, 9, 1),
    ]
    assert stats[2]["status_dict"] == {"success": 9, "HTTP Error 404: Not Found": 1}


def test_conditions_are_what_they_say(demo):
    found = samples(demo)
    by_condition = {meta["demo_condition"]: video for meta, video in found.values()}
    counts = Counter(meta["demo_condition"] for meta, _ in found.values())
    assert counts == {GOOD: 19, FAILED_TO_DOWNLOAD: 2} | dict.fromkeys(
        ("eight_frames", "one_frame", "truncated_index", "truncated_frames", "sound_only", "web_page"), 1
    )
    assert count_frames(by_condition["eight_frames"]) == 8
    assert count_frames(by_condition["one_frame"]) == 1
    with av.open(io.BytesIO(by_condition["sound_only"])) as container:
        assert [stream.type for stream in container.streams] == ["audio"]
    for condition in ("truncated_index", "web_page"):
        with pytest.raises(av.error.InvalidDataError):
            av.open(io.BytesIO(by_condition[condition]))
    with av.open(io.BytesIO(by_condition["truncated_frames"])) as container:
        frames = container.decode(video=0)
        next(frames)
        with pytest.raises(av.error.InvalidDataError):
            list(frames)


def test_good_samples_decode(demo):
    frames = {
        key: count_frames(video) for key, (meta, video) in samples(demo).items() if meta["demo_condition"] == GOOD
    }
    takes = {f"000000000_{number:05d}": 72 for number in range(6)} | {"000000000_00006": 40}
    shots = {f"00001000{number}_00000": count for number, count in enumerate((30, 46, 61, 50, 55))}
    others = {"000000002_00000": 120, "000010006_00000": 169, "000010007_00000": 169}
    whole = {"000020000": 132, "000020001": 72, "000020005": 95, "000020008": 120}
    assert frames == takes | shots | others | whole


def test_table_names_files_that_are_there(demo):
    with (demo / "clips.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len({row["videoid"] for row in rows}) == len(rows) == 6
    for row in rows:
        assert count_frames((demo / row["uri"]).read_bytes()) >= 46
        assert row["caption"]


def times(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_second_run_does_nothing(demo):
    before = times(demo)
    console = Console(file=io.StringIO(), width=200)
    assert make_demo_data(demo, console) is False
    assert "nothing to do" in console.file.getvalue()
    assert times(demo) == before


def test_damage_is_repaired_byte_for_byte(demo, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy)
    tar = copy / "shards" / "00001.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    (copy / "mine.txt").write_text("left alone")
    assert read_record(copy) is None
    assert make_demo_data(copy, Console(file=io.StringIO())) is True
    assert (copy / RECORD).read_text() == (demo / RECORD).read_text()
    assert tar.read_bytes() == (demo / "shards" / "00001.tar").read_bytes()
    assert sorted(path.name for path in copy.iterdir()) == ["clips", "clips.csv", RECORD, "mine.txt", "shards"]


def test_output_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a folder"):
        make_demo_data(tmp_path / "file", Console(file=io.StringIO()))
