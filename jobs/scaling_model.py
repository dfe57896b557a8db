"""What limits a run first: costs per shard that were measured small, carried to many GPUs and shards.

    python jobs/scaling_model.py
    python jobs/scaling_model.py --gpus 1000 --shards 100000 --frames-per-clip 540

The measured costs come from `jobs/simulate.py`; docs/scaling.md has them with their commands. A limit is a rate of
shards that something cannot exceed; the run asks for a rate; the first limit is the one with the largest share used.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console

WEBVID_CLIPS = 10_727_607
S3_PUTS_PER_PREFIX = 3500.0
"""Requests per second that S3 promises per prefix."""
S3_GETS_PER_PREFIX = 5500.0
HOUR = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds and bytes, measured; two cores of a noisy virtual machine, so rather too much than too little."""

    driver_cpu: float = 7.5e-3
    """Of the driver per shard: Ray Data's scheduling and the commit on a local disk, 24 actors."""
    request_cpu: float = 1.3e-3
    """Of the driver per request to S3."""
    commit_requests: int = 3
    """Two HEADs and a PUT."""
    request_latency: float = 0.03
    """A request to S3 until its reply."""
    commits_at_once: int = 32
    monitor_cpu: float = 1.9e-3
    """Of the RunMonitor actor, per shard: three calls."""
    gcs_cpu: float = 0.7e-3
    start_per_shard: float = 0.75e-3
    """Of the driver before the first actor starts: a row and a block per shard."""
    plan_per_shard: float = 0.1e-3
    """Of listing the source and of listing and reading packed or local receipts."""
    manifest_per_shard: float = 0.2e-3
    manifest_bytes_per_shard: int = 230
    driver_bytes_per_shard: int = 12_000
    """Memory: the plan, Ray Data's blocks, the run report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A run: how much there is to encode, and with what."""

    gpus: int = 1000
    clips: int = WEBVID_CLIPS
    shards: int = 100_000
    frames_per_clip: float = 132.0
    """Frames that are encoded: 18 s at 8 frames/s are four windows of 33; all frames at 30 frames/s are 540."""
    frames_per_gpu_second: float = 500.0

    @property
    def clips_per_shard(self) -> float:
        return self.clips / self.shards

    @property
    def shard_seconds(self) -> float:
        """One GPU's time for a shard."""
        return self.clips_per_shard * self.frames_per_clip / self.frames_per_gpu_second

    @property
    def shards_per_second(self) -> float:
        """What all GPUs together ask for."""
        return self.gpus / self.shard_seconds

    @property
    def seconds(self) -> float:
        return self.shards / self.shards_per_second


@dataclass(frozen=True, slots=True)
class Limit:
    """Something that holds at most `capacity` shards per second, of which a run uses `share`."""

    name: str
    capacity: float
    share: float


def limits(costs: Costs, work: Workload) -> list[Limit]:
    """All limits on the rate, the first to be met first."""
    commit_cpu = costs.commit_requests * costs.request_cpu
    commit_seconds = costs.commit_requests * costs.request_latency
    capacities = {
        "driver's processor (scheduling and commits)": 1 / (costs.driver_cpu + commit_cpu),
        f"commits, {costs.commits_at_once} at once": costs.commits_at_once / commit_seconds,
        "RunMonitor's processor (three calls a shard)": 1 / costs.monitor_cpu,
        "Ray's GCS": 1 / costs.gcs_cpu,
        "S3 PUTs per prefix (one of shards/, index/ and receipts/ each)": S3_PUTS_PER_PREFIX,
        "S3 GETs and HEADs per prefix (one HEAD of shards/ and index/ each)": S3_GETS_PER_PREFIX,
        "S3 GETs of the source's prefix": S3_GETS_PER_PREFIX,
    }
    demand = work.shards_per_second
    found = [Limit(name, capacity, demand / capacity) for name, capacity in capacities.items()]
    return sorted(found, key=lambda limit: -limit.share)


def serial(costs: Costs) -> float:
    """Shards per second that one commit after the other would allow."""
    return 1 / (costs.commit_requests * (costs.request_latency + costs.request_cpu))


def fixed_costs(costs: Costs, work: Workload) -> dict[str, float]:
    """Seconds that a run spends once, whatever the number of GPUs."""
    return {
        "plan or resume": costs.plan_per_shard * work.shards,
        "hand the shards to Ray": costs.start_per_shard * work.shards,
        "manifest": costs.manifest_per_shard * work.shards,
    }


def smallest_shard(costs: Costs, work: Workload, *, share: float = 0.5) -> float:
    """Clips per shard below which the first limit would be used to more than `share`."""
    capacity = min(limit.capacity for limit in limits(costs, work))
    return work.gpus * work.frames_per_gpu_second / work.frames_per_clip / (capacity * share)


def scaling_model(
    gpus: Annotated[int, typer.Option(min=1)] = 1000,
    shards: Annotated[int, typer.Option(min=1)] = 100_000,
    clips: Annotated[int, typer.Option(min=1)] = WEBVID_CLIPS,
    frames_per_clip: Annotated[float, typer.Option(min=1, help="Frames encoded of a clip.")] = 132.0,
    frames_per_gpu_second: Annotated[float, typer.Option(min=1e-3)] = 500.0,
) -> None:
    """Limits of a run, the first one first; Markdown tables."""
    work = Workload(
        gpus=gpus,
        clips=clips,
        shards=shards,
        frames_per_clip=frames_per_clip,
        frames_per_gpu_second=frames_per_gpu_second,
    )
    console = Console(highlight=False, markup=False)
    console.print("\n".join(report(Costs(), work)), soft_wrap=True)


def report(costs: Costs, work: Workload) -> list[str]:
    lines = [
        f"{work.gpus} GPUs at {work.frames_per_gpu_second:g} frames/s, {work.shards} shards of "
        f"{work.clips_per_shard:.0f} clips of {work.frames_per_clip:g} frames: "
        f"{work.shards_per_second:.1f} shards/s, {work.shard_seconds:.0f} s a shard, {work.seconds / HOUR:.1f} h.",
        "",
        "| limit | shards/s | used |",
        "|---|---|---|",
    ]
    lines += [f"| {limit.name} | {limit.capacity:.0f} | {limit.share:.0%} |" for limit in limits(costs, work)]
    lines += ["", "| once per run | s | of the run |", "|---|---|---|"]
    lines += [
        f"| {name} | {seconds:.0f} | {seconds / work.seconds:.1%} |"
        for name, seconds in fixed_costs(costs, work).items()
    ]
    megabytes = [work.shards * each / 1e6 for each in (costs.manifest_bytes_per_shard, costs.driver_bytes_per_shard)]
    lines += [
        "",
        f"manifest {megabytes[0]:.0f} MB; driver memory {megabytes[1]:.0f} MB more than at the start; "
        f"one commit after the other would allow {serial(costs):.0f} shards/s; "
        f"the first limit is half used at {smallest_shard(costs, work):.0f} clips a shard.",
    ]
    return lines


if __name__ == "__main__":
    typer.run(scaling_model)
