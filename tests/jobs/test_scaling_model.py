"""The model's arithmetic, on cases that can be done by hand."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from jobs.scaling_model import Costs, Workload, fixed_costs, limits, report, serial, smallest_shard

WORK = Workload(gpus=10, clips=1000, shards=100, frames_per_clip=50.0, frames_per_gpu_second=100.0)


def test_demand() -> None:
    """10 clips of 50 frames are 500 frames: 5 s on a GPU, so ten GPUs end two shards a second."""
    assert (WORK.clips_per_shard, WORK.shard_seconds, WORK.shards_per_second, WORK.seconds) == (10, 5, 2, 50)


def test_the_first_limit_is_the_one_used_most() -> None:
    costs = Costs(driver_cpu=0.07, request_cpu=0.01, commit_requests=3)
    first, *others = limits(costs, WORK)
    assert first.name.startswith("driver's processor")
    assert (first.capacity, first.share) == (pytest.approx(10), pytest.approx(0.2))
    assert [limit.share for limit in others] == sorted((limit.share for limit in others), reverse=True)


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"monitor_cpu": 1.0}, "RunMonitor"),
        ({"request_latency": 100.0}, "commits, 32 at once"),
        ({"gcs_cpu": 1.0}, "Ray's GCS"),
        (
            {"driver_cpu": 1e-9, "request_cpu": 1e-9, "request_latency": 1e-9, "monitor_cpu": 1e-9, "gcs_cpu": 1e-9},
            "S3",
        ),
    ],
)
def test_any_cost_can_be_the_first_limit(changes: dict[str, float], first: str) -> None:
    assert limits(replace(Costs(), **changes), WORK)[0].name.startswith(first)  # type: ignore[arg-type]


def test_one_commit_at_a_time_and_many() -> None:
    costs = Costs(commit_requests=3, request_latency=0.03, request_cpu=0.0, commits_at_once=32)
    assert serial(costs) == pytest.approx(1 / 0.09)
    at_once = next(limit for limit in limits(costs, WORK) if "at once" in limit.name)
    assert at_once.capacity == pytest.approx(32 * serial(costs))


def test_shards_of_the_smallest_size_use_the_asked_share() -> None:
    costs = Costs()
    clips = smallest_shard(costs, WORK, share=0.5)
    work = replace(WORK, shards=100, clips=round(clips * 100))
    assert limits(costs, work)[0].share == pytest.approx(0.5, rel=0.05)


def test_costs_are_linear_in_shards_and_all_reported() -> None:
    costs = Costs()
    once, twice = fixed_costs(costs, WORK), fixed_costs(costs, replace(WORK, shards=200))
    assert twice == pytest.approx({name: 2 * seconds for name, seconds in once.items()})
    text = "\n".join(report(costs, WORK))
    assert all(name in text for name in once)
    assert all(limit.name in text for limit in limits(costs, WORK))
    assert all(getattr(costs, field.name) > 0 for field in fields(costs))
