"""The shard writer: refusals, keys, and the same bytes for the same rows."""

from __future__ import annotations

import tarfile

import pyarrow.parquet as pq
import pytest

from jobs.v2d_shards import FAILED_TO_DOWNLOAD, CutClip, DownloadedVideo, sample_key, write_shard


def test_keys():
    assert sample_key(12, 3) == "000120003"
    assert sample_key(12, 3, 1) == "000120003_00001"
    assert sample_key(0, 0) == "000000000"


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "expects bytes for all"),
        ({"clips": (CutClip(start=0, stop=1),)}, "expects bytes for all"),
        ({"clips": ()}, "expects bytes"),
        ({"video": b"x", "clips": (CutClip(start=0, stop=1, video=b"x"),)}, "got both"),
        ({"video": b"x", "status": FAILED_TO_DOWNLOAD}, "expects bytes for none"),
        ({"status": "failed"}, "expected status"),
    ],
)
def test_contradicting_rows_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        DownloadedVideo(caption="a caption", **parts)


def test_rows_come_from_one_table(tmp_path):
    rows = [DownloadedVideo(caption="a", video=b"x"), DownloadedVideo(caption="b", video=b"x", columns={"id": "1"})]
    with pytest.raises(ValueError, match="rows of one table"):
        write_shard(tmp_path, 0, rows)
    with pytest.raises(ValueError, match="got 0"):
        write_shard(tmp_path, 0, [])


def test_a_failed_clip_keeps_its_span_and_has_one_sample(tmp_path):
    spans = (CutClip(start=1.0, stop=2.0), CutClip(start=3.0, stop=4.0))
    row = DownloadedVideo(caption="a", clips=spans, status=FAILED_TO_DOWNLOAD, error_message="gone")
    written = write_shard(tmp_path, 7, [row])
    assert written.keys == ("000070000",)
    assert pq.read_table(written.sidecar).to_pylist()[0]["clips"] == [[1.0, 2.0], [3.0, 4.0]]


def test_same_rows_same_bytes(v2d_shards, tmp_path):
    for tar, again in zip(v2d_shards(tmp_path / "one"), v2d_shards(tmp_path / "two"), strict=True):
        for suffix in (".tar", ".parquet", "_stats.json"):
            one, two = (path.with_name(path.stem + suffix) for path in (tar, again))
            assert one.read_bytes() == two.read_bytes()
        with tarfile.open(tar) as file:
            videos = [member for member in file if member.name.endswith(".mp4")]
        assert len(videos) == 3
