"""Tables: every row exactly once whatever the cut, columns never shifted, files found, and errors that help."""

from __future__ import annotations

import csv
import datetime
import decimal
import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, SourceChanged, SourceError, StorageError
from pipeline.records import Rejection, VideoShard
from pipeline.sources import SourceDigest, TableSource, plan_source, read_shard
from pipeline.storage import Store
from tests.s3_server import S3Server

FUZZ = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True)
class ReadClip:
    key: str
    video: bytes
    caption: str
    metadata: dict[str, Any]
    file_name: str


def read_span(shard: VideoShard, spec: TableSource, max_clip_bytes: int = 1 << 20) -> list[ReadClip | Rejection]:
    digest, outcomes = SourceDigest(), []
    for one in read_shard(shard, spec, max_clip_bytes=max_clip_bytes, digest=digest):
        assert one.shard_id == shard.id
        if isinstance(one, Rejection):
            json.dumps(one.message + one.key, ensure_ascii=False).encode("utf-8")
            outcomes.append(one)
            continue
        with one.video as blob:
            video = os.pread(blob.fd, blob.size, 0)
        assert one.video_sha256 == hashlib.sha256(video).hexdigest()
        outcomes.append(ReadClip(one.key, video, one.caption, one.metadata, one.file_name))
    assert digest.sha256 is None, "a span of a table has no hash of its own"
    return outcomes


def read_table(spec: TableSource, **options: Any) -> list[ReadClip | Rejection]:
    return [one for shard in plan_source(spec).shards for one in read_span(shard, spec, **options)]


def clips_of(outcomes: list[ReadClip | Rejection]) -> list[ReadClip]:
    rejected = [one for one in outcomes if isinstance(one, Rejection)]
    assert rejected == []
    return [one for one in outcomes if isinstance(one, ReadClip)]


def classes_of(outcomes: list[ReadClip | Rejection]) -> list[str]:
    return [one.error_class if isinstance(one, Rejection) else "clip" for one in outcomes]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., TableSource]:
    """Write a CSV beside two videos; the source that reads it."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_bytes(name.encode())

    def write_csv(content: bytes | str, **spec: Any) -> TableSource:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return TableSource(url=str(path), **spec)

    return write_csv


# CSV dialects


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
@pytest.mark.parametrize("rows_per_shard", [1, 2, 100])
def test_csv_dialects(write: Callable[..., TableSource], end: str, bom: str, rows_per_shard: int) -> None:
    """Quotes, commas, line ends and quotes in quotes, blank lines, a stray quote, no line end at the end."""
    lines = [
        "uri,caption,n",
        'a.mp4,"one, two",1',
        f'b.mp4,"first{end}{end}third ""quoted""",2',
        "",
        "a.mp4,,3",
        'b.mp4,a 5" pipe,4',
        "a.mp4,ünï ☃ \u2028 line,5",
    ]
    spec = write(bom + end.join(lines), rows_per_shard=rows_per_shard)
    clips = clips_of(read_table(spec))
    assert [clip.key for clip in clips] == [f"{n:010d}" for n in range(5)]
    assert [clip.caption for clip in clips] == [
        "one, two",
        f'first{end}{end}third "quoted"',
        "",
        'a 5" pipe',
        "ünï ☃ \u2028 line",
    ]
    assert [clip.metadata["n"] for clip in clips] == list("12345")
    assert [clip.video for clip in clips] == [b"a.mp4", b"b.mp4", b"a.mp4", b"b.mp4", b"a.mp4"]


cells = st.text(alphabet=st.sampled_from('ab,"\n\r ☃\x00é'), max_size=6)


@FUZZ
@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=25),
    rows_per_shard=st.integers(1, 30),
    end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
)
def test_csv_spans_cover_every_row_once(
    write: Callable[..., TableSource], rows: list[tuple[str, str]], rows_per_shard: int, end: str, quoting: Any
) -> None:
    """Whatever Python's csv module writes and wherever it is cut, the rows are the ones that it reads."""
    buffer = io.StringIO(newline="")
    if any("\r" in cell for row in rows for cell in row):
        quoting = csv.QUOTE_ALL  # QUOTE_MINIMAL forgets to quote a carriage return
    writer = csv.writer(buffer, lineterminator=end, quoting=quoting)
    writer.writerows([["uri", "caption", "other"], *(["a.mp4", *row] for row in rows)])
    spec = write(buffer.getvalue(), rows_per_shard=rows_per_shard)
    plan = plan_source(spec)
    spans = [shard.rows for shard in plan.shards]
    assert spans[0] is not None
    assert [span[0] for span in spans if span] == list(range(0, len(rows), rows_per_shard))
    assert spans[-1] == (spans[-1][0] if spans[-1] else 0, len(rows))
    clips = clips_of(read_table(spec))
    assert [(clip.caption, clip.metadata["other"]) for clip in clips] == rows
    assert [int(clip.key) for clip in clips] == list(range(len(rows)))


@FUZZ
@given(
    body=st.text(alphabet=st.sampled_from('ab,"\n\r'), max_size=60),
    rows_per_shard=st.integers(1, 8),
)
def test_planner_and_reader_agree_on_any_text(
    write: Callable[..., TableSource], body: str, rows_per_shard: int
) -> None:
    """A malformed CSV too: as many outcomes as rows, in the same order however it is cut, or refused as a whole."""
    outcomes = []
    for step in (rows_per_shard, 1000):
        spec = write("uri,caption\na.mp4,x\n" + body, rows_per_shard=step)
        try:
            plan = plan_source(spec)
        except SourceError:
            with pytest.raises(SourceError, match=r"is a quote missing\?"):
                plan_source(spec)
            return
        for shard in plan.shards:
            assert shard.rows is not None
            assert len(read_span(shard, spec)) == shard.rows[1] - shard.rows[0]
        outcomes.append([(one.key, getattr(one, "caption", None)) for one in read_table(spec)])
    assert outcomes[0] == outcomes[1]


def test_ragged_rows_are_refused_not_shifted(write: Callable[..., TableSource]) -> None:
    spec = write("uri,caption\na.mp4,whole\na.mp4\na.mp4,one, two\nb.mp4,whole\n", key="{uri}")
    outcomes = read_table(spec)
    assert classes_of(outcomes) == ["unsafe_key", "bad_metadata", "bad_metadata", "unsafe_key"]
    spec = write("uri,caption\na.mp4,whole\na.mp4\na.mp4,one, two\nb.mp4,whole\n")
    outcomes = read_table(spec)
    assert classes_of(outcomes) == ["clip", "bad_metadata", "bad_metadata", "clip"]
    assert [one.key for one in outcomes] == [f"{n:010d}" for n in range(4)]
    assert isinstance(outcomes[2], Rejection)
    assert outcomes[2].message == "the row has 3 values, the table has 2 columns"


def test_text_that_is_not_utf8(write: Callable[..., TableSource]) -> None:
    spec = write(b"uri,caption,note\na.mp4,caf\xe9,x\na.mp4,fine,\xff\na.mp4,fine,x\ncaf\xe9.mp4,fine,x\n")
    assert classes_of(read_table(spec)) == ["bad_metadata", "bad_metadata", "clip", "bad_metadata"]


@pytest.mark.parametrize(
    "content",
    ['uri,caption\na.mp4,"open\na.mp4,x\na.mp4,y\n', 'uri,caption\na.mp4,x\na.mp4,"' + "open\n" * 50_000],
)
def test_a_missing_quote_does_not_swallow_rows(write: Callable[..., TableSource], content: str) -> None:
    with pytest.raises(SourceError, match=r"row [01].*is a quote missing"):
        plan_source(write(content))


@pytest.mark.timeout(20)
def test_a_file_without_lines_is_no_csv(write: Callable[..., TableSource]) -> None:
    with pytest.raises(SourceError, match="is it a CSV"):
        plan_source(write(b"uri,caption\n" + b"x" * (17 << 20)))


@pytest.mark.timeout(20)
def test_a_long_quoted_field_is_read_in_linear_time(write: Callable[..., TableSource]) -> None:
    with pytest.raises(SourceError, match="field larger than field limit"):
        plan_source(write('uri,caption\na.mp4,"' + "ab\n" * 3_000_000))


# Parquet


def parquet_source(path: Path, columns: dict[str, Any], *, row_group_size: int = 3, **spec: Any) -> TableSource:
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return TableSource(url=str(path), **spec)


@settings(FUZZ, max_examples=40)
@given(rows=st.integers(1, 40), rows_per_shard=st.integers(1, 50), row_group_size=st.integers(1, 15))
def test_parquet_spans_cover_every_row_once(
    write: Callable[..., TableSource], tmp_path: Path, rows: int, rows_per_shard: int, row_group_size: int
) -> None:
    columns = {"uri": ["a.mp4"] * rows, "caption": [f"row {n}" for n in range(rows)]}
    path = tmp_path / "t.parquet"
    spec = parquet_source(path, columns, row_group_size=row_group_size, rows_per_shard=rows_per_shard)
    clips = clips_of(read_table(spec))
    assert [clip.caption for clip in clips] == columns["caption"]
    assert [int(clip.key) for clip in clips] == list(range(rows))


def test_parquet_values_become_json(write: Callable[..., TableSource], tmp_path: Path) -> None:
    columns = {
        "uri": ["a.mp4"],
        "caption": pa.array([None], pa.string()),
        "number": [7],
        "ratio": [float("nan")],
        "wide": [float("inf")],
        "day": [datetime.date(2026, 1, 2)],
        "price": [decimal.Decimal("1.50")],
        "raw": [b"\xff"],
        "nested": [{"a": [1, None]}],
    }
    (clip,) = clips_of(read_table(parquet_source(tmp_path / "t.parquet", columns, key="clip-{number}")))
    assert clip.key == "clip-7"
    assert clip.caption == ""
    assert clip.metadata == {
        "uri": "a.mp4",
        "caption": None,
        "number": 7,
        "ratio": None,
        "wide": None,
        "day": "2026-01-02",
        "price": "1.50",
        "raw": "b'\\xff'",
        "nested": {"a": [1, None]},
    }


def test_a_file_that_is_no_parquet(tmp_path: Path) -> None:
    for content in (b"", b"PAR1 not really PAR1", b"uri,caption\n"):
        (tmp_path / "t.parquet").write_bytes(content)
        with pytest.raises(SourceError, match=r"t\.parquet is not a Parquet file"):
            plan_source(TableSource(url=str(tmp_path / "t.parquet")))


# Templates, keys and files


def test_templates(write: Callable[..., TableSource], tmp_path: Path) -> None:
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages/12.mp4").write_bytes(b"webvid")
    spec = write(
        "videoid,name,page_dir\n12,a dog,pages\n",
        uri="{page_dir}/{videoid}.mp4",
        key="{page_dir}/{videoid}",
        caption_column="name",
    )
    assert clips_of(read_table(spec)) == [
        ReadClip(
            "pages/12",
            b"webvid",
            "a dog",
            {"videoid": "12", "name": "a dog", "page_dir": "pages"},
            "pages/12.mp4",
        )
    ]


def test_empty_values_make_no_other_path(write: Callable[..., TableSource], tmp_path: Path) -> None:
    """Half a template is another file, or another key."""
    table = "dir,file,caption\n,a.mp4,x\n.,,x\n.,a.mp4,x\n"
    assert classes_of(read_table(write(table, uri="{dir}/{file}"))) == ["no_video", "no_video", "clip"]
    outcomes = read_table(write(table, uri="a.mp4", key="k{dir}"))
    assert classes_of(outcomes) == ["bad_metadata", "unsafe_key", "unsafe_key"]
    assert outcomes[0].key == "0000000000", "known by its number"
    columns = {"id": pa.array([None, 1], pa.int64()), "caption": ["x", "y"]}
    spec = parquet_source(tmp_path / "t.parquet", columns, uri="a.mp4", key="{id}")
    assert classes_of(read_table(spec)) == ["bad_metadata", "clip"]


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("uri", "{url}", "source.uri: .*'url'.*columns: .'uri', 'caption'."),
        ("uri", "{uri.__class__}", "source.uri: .*plain fields such as {uri}"),
        ("uri", "{uri!r}", "source.uri: .*plain fields"),
        ("uri", "{uri:>9}", "source.uri: .*plain fields"),
        ("uri", "{}", "source.uri: .*plain fields"),
        ("uri", "{uri", "source.uri: template '{uri'"),
        ("key", "{0}", "source.key: .*'0'"),
        ("caption_column", "text", "source.caption_column: expected one of .'uri', 'caption'., got 'text'"),
    ],
)
def test_settings_that_do_not_fit_the_table(
    write: Callable[..., TableSource], setting: str, value: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_source(write("uri,caption\na.mp4,x\n", **{setting: value}))


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", ConfigError, "columns: .."),
        ("uri,caption\n", SourceError, "table.csv has no rows"),
        ("uri,caption\n\n\n", SourceError, "table.csv has no rows"),
        ("uri,caption,uri\na.mp4,x,b.mp4\n", ConfigError, "two columns of one name"),
    ],
)
def test_tables_without_rows(
    write: Callable[..., TableSource], content: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plan_source(write(content))


def test_a_table_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"source.url: .*/no\.csv does not exist"):
        plan_source(TableSource(url=str(tmp_path / "no.csv")))


def test_rows_whose_file_cannot_be_had(write: Callable[..., TableSource], tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "fifo.mp4")
    (tmp_path / "large.mp4").write_bytes(b"x" * 101)
    (tmp_path / "fits.mp4").write_bytes(b"x" * 100)
    uris = {
        "a.mp4": "clip",
        "absent.mp4": "missing_file",
        "folder.mp4": "missing_file",
        "fifo.mp4": "missing_file",
        "/dev/zero": "missing_file",
        "a.mp4/b.mp4": "missing_file",
        f"{'x' * 300}.mp4": "missing_file",
        "a\0.mp4": "missing_file",
        "nope://bucket/a.mp4": "missing_file",
        "": "no_video",
        "large.mp4": "too_large",
        "fits.mp4": "clip",
    }
    spec = write("uri,caption\n" + "".join(f"{uri},x\n" for uri in uris))
    assert classes_of(read_table(spec, max_clip_bytes=100)) == list(uris.values())


def test_a_wrong_root_is_refused_before_every_clip_is_rejected(write: Callable[..., TableSource]) -> None:
    table = "uri,caption\n" + ",x\n" + "a.mp4,x\nb.mp4,x\n"
    with pytest.raises(ConfigError, match=r"(?s)source\.root.*none of the first 3 rows.*uri"):
        plan_source(write(table, root="/nowhere"))
    assert len(plan_source(write("uri,caption\n" + "no.mp4,x\n" * 99 + "a.mp4,x\n")).shards) == 1


def test_a_client_that_is_not_installed_is_no_fault_of_the_row(write: Callable[..., TableSource]) -> None:
    with pytest.raises(StorageError, match="gcsfs"):
        read_table(write("uri,caption\ngs://bucket/a.mp4,x\n"))


def test_duplicate_and_unsafe_keys(write: Callable[..., TableSource]) -> None:
    table = "uri,caption,id\n" + "".join(f"a.mp4,x,{key}\n" for key in ("k", "k", "../k", "v1.5", "/k", "l"))
    outcomes = read_table(write(table, key="{id}"))
    assert classes_of(outcomes) == ["clip", "duplicate_key", "unsafe_key", "unsafe_key", "unsafe_key", "clip"]


def test_where_relative_files_are(write: Callable[..., TableSource], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.mp4").write_bytes(b"of the root")
    table = f"uri,caption\na.mp4,x\n{tmp_path}/b.mp4,x\nfile://{tmp_path}/a.mp4,x\n"
    assert [clip.video for clip in clips_of(read_table(write(table)))] == [b"a.mp4", b"b.mp4", b"a.mp4"]
    videos = [clip.video for clip in clips_of(read_table(write(table, root=f"{other}/")))]
    assert videos == [b"of the root", b"b.mp4", b"a.mp4"]


def test_relative_settings_mean_the_drivers_folder(
    write: Callable[..., TableSource], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("uri,caption\na.mp4,x\n")
    monkeypatch.chdir(tmp_path)
    spec = TableSource(url="table.csv", root=".")
    monkeypatch.chdir("/")
    assert len(clips_of(read_table(spec))) == 1


# Identity


def test_the_plan(write: Callable[..., TableSource]) -> None:
    spec = write("uri,caption\n" + "a.mp4,x\n" * 5, rows_per_shard=2)
    plan = plan_source(spec)
    content = Path(spec.url).read_bytes()
    assert plan.table_sha256 == hashlib.sha256(content).hexdigest()
    assert [(shard.id, shard.rows) for shard in plan.shards] == [
        ("table-00000", (0, 2)),
        ("table-00001", (2, 4)),
        ("table-00002", (4, 5)),
    ]
    assert {(shard.kind, shard.url, shard.size) for shard in plan.shards} == {("table", spec.url, len(content))}


def test_a_table_that_changed_since_planning_is_refused(write: Callable[..., TableSource]) -> None:
    spec = write("uri,caption\na.mp4,x\nb.mp4,y\n", rows_per_shard=1)
    shards = plan_source(spec).shards
    write("uri,caption\nb.mp4,added\na.mp4,x\nb.mp4,y\n")
    with pytest.raises(SourceChanged, match=r"table\.csv: it had 28 bytes .* now 40"):
        read_span(shards[1], spec)


def test_a_table_on_s3(s3_server: S3Server) -> None:
    store = Store(f"{s3_server.url}/table", options=s3_server.options)
    store.create("videos/a.mp4", b"in the bucket")
    store.create("t.csv", b"uri,caption\na.mp4,x\nabsent.mp4,y\n")
    spec = TableSource(url=f"{store.url}/t.csv", root=f"{store.url}/videos", options=store.options)
    outcomes = read_table(spec)
    assert classes_of(outcomes) == ["clip", "missing_file"]
    assert isinstance(outcomes[0], ReadClip)
    assert outcomes[0].video == b"in the bucket"
