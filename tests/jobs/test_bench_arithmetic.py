"""What the benchmarks' figures mean: rates, ratios, tables, memory, operations. No figure is checked here."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from cvvae import SPECS
from jobs.bench_gpu import GpuBench, Setting, encode_flops, peak_flops, probe_table, size_table
from jobs.bench_pipeline import Measured, shards_for
from jobs.bench_report import BenchTable, machine, peak_rss_mib, ratio_text, reset_peak_rss, rss_mib
from jobs.steady_rate import ShardSpan, SteadyRate


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other are slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_shards_one_after_the_other_count_from_the_end_of_the_first() -> None:
    spans = [ShardSpan(5.0 * n, 5.0 * n + 5, frames=100, encode_seconds=4.0) for n in range(4)]
    rate = SteadyRate.of(spans)
    assert (rate.frames, rate.seconds) == (300, 15)
    assert rate.per_second == 20
    assert rate.encode_share(1) == pytest.approx(0.8)


def test_what_was_done_of_a_shard_before_the_first_receipt_does_not_count() -> None:
    # two at a time: when the first ends, half of the second is done; counted whole, the rate would be 300 / 15
    spans = [
        ShardSpan(0, 10, 100, 4.0),
        ShardSpan(5, 15, 100, 4.0),
        ShardSpan(10, 20, 100, 4.0),
        ShardSpan(15, 25, 100, 4.0),
    ]
    rate = SteadyRate.of(spans)
    assert (rate.frames, rate.seconds) == (250, 15)
    assert rate.encode_seconds == pytest.approx(10.0)


def test_one_shard_has_no_steady_state() -> None:
    with pytest.raises(ValueError, match="at least two"):
        SteadyRate.of([ShardSpan(0, 1, 1, 1)])


def test_shards_last_for_the_time_asked_for() -> None:
    calibration = Measured(SteadyRate(frames=400, seconds=20, encode_seconds=19), startup_seconds=1, num_shards=5)
    assert shards_for(100, calibration) == 24


def test_ratios_are_taken_round_by_round() -> None:
    assert ratio_text([2.0], [1.0]) == "2.00"
    assert ratio_text([2.0, 9.0, 1.0], [1.0, 3.0, 1.0]) == "2.00 (1.00 to 3.00)"


def test_a_table_is_markdown() -> None:
    table = BenchTable("title", ("what", "s"), notes=["a note"])
    table.add("one", "1.0")
    lines = ["title:", "", "| what |   s |", "| ---- | --: |", "| one  | 1.0 |", "", "a note"]
    assert str(table).strip().splitlines() == lines
    with pytest.raises(ValueError, match="expected 2 cells"):
        table.add("one")


def test_the_machine_is_named() -> None:
    assert torch.__version__ in machine()
    assert "cores" in machine()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_the_peak_is_that_since_the_reset() -> None:
    before = rss_mib()
    held = bytearray(os.urandom(1) * (64 << 20))
    del held
    reset_peak_rss()
    low = peak_rss_mib()
    held = bytearray(os.urandom(1) * (64 << 20))
    high = peak_rss_mib()
    assert len(held) == 64 << 20
    assert before is not None
    assert low is not None
    assert high is not None
    assert low < before + 48
    assert high > low + 48


def test_operations_are_those_of_the_paper() -> None:
    assert encode_flops(SPECS["cvvae-sd21"], 17, 256) == pytest.approx(5.67e12, rel=0.01)
    assert encode_flops(SPECS["cvvae-sd21"], 1, 256) == pytest.approx(0.53e12, rel=0.01)


@pytest.mark.parametrize("name", ["ivvae-z4-tiny", "wan21-tiny", "cogvideox-tiny"])
def test_every_measured_family_runs_as_the_gpu_table_does(name: str) -> None:
    device = torch.device("cpu")
    bench = GpuBench(SPECS[name], device, repeats=1)
    table = size_table(bench, 16, ["fp32"], [1], {"fp32": 1e12}, modes=())
    labels = [row[3] for row in table.rows]
    assert labels == ["eager", "eager"] + ["diffusers"] * (name != "ivvae-z4-tiny")
    assert all(float(row[-1]) < 1e-5 for row in table.rows), table
    assert encode_flops(SPECS[name], 17, 16) > 0


def test_the_gpu_tables_without_a_gpu() -> None:
    """All but CUDA itself: the same code on a CPU."""
    device = torch.device("cpu")
    bench = GpuBench(SPECS["cvvae-sd21-tiny"], device, repeats=1)
    timed = bench.time(Setting(size=16, dtype="fp32", layout="contiguous", batch=2))
    assert timed.seconds > 0
    assert timed.relative_rms < 1e-5
    peaks = {"bf16": peak_flops(torch.bfloat16, device, (64,))}
    table = size_table(bench, 16, ["bf16"], [1], peaks, modes=("autotuned",))
    assert [row[:4] for row in table.rows] == [
        ("bf16", "channels_last", "1", "eager"),
        ("bf16", "contiguous", "1", "eager"),
        ("bf16", table.rows[2][1], "1", "autotuned"),
    ]
    assert [row[:2] for row in probe_table(["bf16", "fp32"], device).rows] == [
        ("bf16", "channels_last"),
        ("bf16", "contiguous"),
    ]
