"""Each benchmark runs, at toy size, and prints a row for everything it is to measure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from jobs.bench_decode import bench_decode
from jobs.bench_encode import BF16, FP32, bench_encode
from jobs.bench_gpu import bench_gpu
from jobs.bench_memory import clip_of_length, length_table, shard_table
from jobs.bench_pipeline import CASES, Bench, Case
from jobs.bench_reader import MANY_SHARDS, STORE, bench_reader
from jobs.bench_report import has_fast_bf16
from jobs.rival_readers import READERS
from pipeline.decode.frames import open_frames
from tests.pipeline.reader.made_datasets import write_dataset

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def output_of(job: Callable[..., Any], *arguments: str) -> str:
    app = typer.Typer()
    app.command()(job)
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done.output


def test_decode() -> None:
    output = output_of(bench_decode, "--rounds", "1", "--seconds", "0.01", "--clip", "carphone_pristine.mp4")
    rows = [line for line in output.splitlines() if line.startswith("| carphone_pristine.mp4")]
    assert ["decord" in row for row in rows] == [True, False]


@pytest.mark.slow
def test_remote_decode(ray_environment: dict[str, str]) -> None:
    """As a process of its own: it starts a Ray of its own."""
    command = [sys.executable, "jobs/bench_remote_decode.py", "--rounds", "1", "--seconds", "0.01"]
    command += ["--children", "1", "--clip", "carphone_pristine.mp4"]
    done = subprocess.run(command, cwd=PROJECT, env=os.environ | ray_environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "| carphone_pristine.mp4 |" in done.stdout


def test_encode() -> None:
    output = output_of(
        bench_encode,
        *("--spec", "cvvae-sd21-tiny", "--frames", "5", "--size", "16", "--rounds", "1", "--threads", "1"),
    )
    assert output.count("| within |") == len(FP32), output
    assert output.count("| bf16 ") == (len(BF16) if has_fast_bf16() else 0)
    assert "not measured" in output or has_fast_bf16()


def test_memory(tmp_path: Path) -> None:
    for table in (length_table(tmp_path, [33], 32), shard_table(tmp_path, [2], 32)):
        ((_, frames, *mebibytes),) = table.rows
        assert int(frames) > 0
        assert all(mib == "not known" or int(mib) >= 0 for mib in mebibytes)


def test_a_long_clip_has_its_length(tmp_path: Path) -> None:
    (tmp_path / "made.mp4").write_bytes(clip_of_length(481, tmp_path))  # longer than the clip it is made of
    with open_frames(str(tmp_path / "made.mp4"), "pyav") as frames:
        assert sum(1 for _ in frames) == 481


@pytest.mark.slow
def test_readers(tmp_path: Path) -> None:
    """A row for each, with figures where the library is there, and the files read plainly."""
    for home in (tmp_path, tmp_path / STORE):
        for format_name in ("webdataset", "parquet"):
            write_dataset(home / format_name, shards=2, small=80, long=0, format_name=format_name)
    output = output_of(bench_reader, "--folder", str(tmp_path), "--rounds", "1", "--no-store", "--no-dropped")
    rows = {line.split("|")[1].strip(): line for line in output.splitlines() if line.startswith("| ")}
    assert {"plain read of the tars", str(MANY_SHARDS), *(reader.name for reader in READERS)} <= rows.keys()
    for name in ("ours, tars", "ours, Parquet", "webdataset"):
        assert "failed" not in rows[name]


@pytest.mark.slow
def test_the_pipeline_and_the_bare_loop(tmp_path: Path) -> None:
    """Real jobs, a few seconds long."""
    case = Case(spec="cvvae-sd21-tiny", size=16, max_windows=1, clips_per_shard=2, tiles_per_batch=2)
    bench = Bench(case, tmp_path, threads=1, children=1)
    loop = bench.bare(0.1)
    run = bench.pipeline(num_actors=2, num_shards=4)
    for measured, num_shards in ((loop, 2), (run, 4)):
        assert measured.num_shards >= num_shards
        assert measured.rate.per_second > 0
        assert measured.startup_seconds > 0
    assert run.num_shards == 4


def test_a_job_that_fails_says_why(tmp_path: Path) -> None:
    bench = Bench(CASES["tiny"], tmp_path, threads=1, children=1)
    (tmp_path / "bad.yaml").write_text("source: {kind: webdataset, urls: /nowhere}")
    with pytest.raises(SystemExit, match="output"):
        bench._run_job(tmp_path / "bad.yaml")


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with one, too: there it is hidden, since measuring takes minutes."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert output_of(bench_gpu).strip() == "no CUDA device: nothing is measured"
