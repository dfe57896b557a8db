"""Mutated tables: refused as a whole by a message, or each row a clip or a rejection."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.decode.pool import DecodePool
from pipeline.errors import ConfigError, RejectionClass, SourceError
from pipeline.records import Rejection
from pipeline.scratch import Scratch
from pipeline.sources import SourceDigest, TableSource, plan_source, read_shard
from tests.fuzz.local_run import assert_verified, run_local, settings_for
from tests.fuzz.mutations import mutate, seeds, tell
from tests.fuzz.peak_memory import PeakMemory

ROWS = 40
FILES = ("plain.mp4", "plain.mkv", "mpeg4.avi")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_clips: dict[str, bytes]) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    for name in FILES:
        (folder / name).write_bytes(small_clips[name])
    return folder


@pytest.fixture(scope="module")
def tables(folder: Path) -> dict[str, list[bytes]]:
    """Whole tables by suffix: CSV with quotes and line ends, Parquet in several row groups, plain and compressed."""
    rows = [{"uri": FILES[n % 3], "caption": f"row {n}", "n": n, "share": n / 3, "list": [n]} for n in range(ROWS)]
    lines = (f'{row["uri"]},"{row["caption"]}, ""quoted""\n",{row["n"]}' for row in rows)
    parquets = []
    for compression, dictionary, group in (("snappy", True, 10), ("none", False, 7)):
        path = folder / "whole.parquet"
        pq.write_table(
            pa.Table.from_pylist(rows), path, row_group_size=group, compression=compression, use_dictionary=dictionary
        )
        parquets.append(path.read_bytes())
    return {".csv": [("uri,caption,n\n" + "\n".join(lines)).encode()], ".parquet": parquets}


def outcome(spec: TableSource) -> Counter[str]:
    """Clips and rejections by class; as many as the plan has rows."""
    ends: Counter[str] = Counter()
    for shard in plan_source(spec).shards:
        assert shard.rows is not None
        before = ends.total()
        for one in read_shard(shard, spec, max_clip_bytes=1 << 20, digest=SourceDigest()):
            if isinstance(one, Rejection):
                ends[RejectionClass(one.error_class).value] += 1
            else:
                one.video.close()
                ends["clip"] += 1
        assert ends.total() - before == shard.rows[1] - shard.rows[0], "a row vanished"
    return ends


def sweep(folder: Path, tables: dict[str, list[bytes]], suffix: str, numbers: list[int]) -> None:
    path = folder / f"mutated{suffix}"
    others = [table for some in tables.values() for table in some]
    ends: Counter[str] = Counter()
    with PeakMemory() as peak:
        for seed in numbers:
            draw = random.Random(f"table {seed}")
            path.write_bytes(mutate(draw.choice(tables[suffix]), others, draw))
            try:
                ends += outcome(TableSource(url=str(path), rows_per_shard=15))
            except (ConfigError, SourceError) as error:
                ends[type(error).__name__ if "source." in str(error) else f"{seed=}: {error}"] += 1
            except Exception as error:
                error.add_note(f"{seed=}")
                raise
    tell(numbers, f"{suffix} tables", dict(ends))
    assert not [end for end in ends if end.startswith("seed")], "a message that does not say where"
    assert ends["clip"] > len(numbers) or len(numbers) < 20
    assert peak.own_growth < 512 << 20


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_mutated_tables(folder: Path, tables: dict[str, list[bytes]], suffix: str) -> None:
    sweep(folder, tables, suffix, seeds(0, 100))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_many_mutated_tables(folder: Path, tables: dict[str, list[bytes]], suffix: str) -> None:
    """20,000 in all, about two minutes."""
    sweep(folder, tables, suffix, seeds(1_000_000, 10_000))


def test_a_mutated_table_to_the_end(
    folder: Path, tables: dict[str, list[bytes]], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    """Some of them as a run of their own: what can be planned is encoded, counted and verified."""
    finished = 0
    for seed in seeds(0, 3):
        draw = random.Random(f"table {seed}")
        path = folder / f"run{seed}.csv"
        path.write_bytes(mutate(tables[".csv"][0], tables[".csv"], draw))
        windows = {"frames": 9, "max_windows": 1}
        job = settings_for({"kind": "table", "url": str(path)}, tmp_path / f"out{seed}", windows=windows)
        try:
            manifest = run_local(job, pool, scratch)
        except (ConfigError, SourceError):
            continue
        assert manifest.counts.samples == sum(outcome(TableSource(url=str(path))).values()), f"{seed=}"
        assert_verified(job)
        finished += 1
    assert finished > 0


# Values that Python cannot hold, and captions that are none


def written(folder: Path, table: pa.Table, **spec: object) -> list[tuple[str, str]]:
    """(class or "clip", caption or message) per row."""
    pq.write_table(table, folder / "values.parquet")
    source = TableSource.model_validate({"url": str(folder / "values.parquet"), **spec})
    rows = []
    for shard in plan_source(source).shards:
        for one in read_shard(shard, source, max_clip_bytes=1 << 20, digest=SourceDigest()):
            if isinstance(one, Rejection):
                rows.append((one.error_class, one.message))
            else:
                one.video.close()
                rows.append(("clip", one.caption))
    return rows


def test_captions_that_are_no_text(folder: Path) -> None:
    """pandas writes a missing number as NaN: "nan" is nobody's caption."""
    uris = pa.array(["plain.mp4"] * 4)
    numbers = pa.table({"uri": uris, "caption": pa.array([1.5, float("nan"), None, float("inf")])})
    assert written(folder, numbers) == [
        ("clip", "1.5"),
        ("bad_caption", "caption column 'caption': expected text, got float nan"),
        ("clip", ""),
        ("bad_caption", "caption column 'caption': expected text, got float inf"),
    ]
    lists = pa.table({"uri": uris, "caption": pa.array([["a"], [], None, ["b", "c"]])})
    assert [row[0] for row in written(folder, lists)] == ["bad_caption", "bad_caption", "clip", "bad_caption"]
    raw = pa.table({"uri": uris, "caption": pa.array([b"words"] * 4)})
    assert set(written(folder, raw)) == {
        ("bad_caption", "caption column 'caption': expected text, got bytes b'words'")
    }


def test_a_value_that_python_cannot_hold_costs_its_row_only(folder: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    table = pa.table({"uri": ["plain.mp4"] * 3, "caption": text})
    assert [row[0] for row in written(folder, table)] == ["clip", "bad_metadata", "clip"]
    days = pa.array([0, 2**31 - 1, 1], pa.int32()).cast(pa.date32())
    table = pa.table({"uri": ["plain.mp4"] * 3, "caption": ["x"] * 3, "day": days})
    assert [row[0] for row in written(folder, table)] == ["clip", "bad_metadata", "clip"]


@pytest.mark.parametrize("column", ["a.b", "0", "a[0]", "a b"])
def test_columns_with_names_that_mean_something_to_format(folder: Path, column: str) -> None:
    table = pa.table({column: ["plain.mp4"], "caption": ["x"]})
    assert written(folder, table, uri=f"{{{column}}}") == [("clip", "x")]
