"""A plan against what came of it: the run's own report has it where plan.json was there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.dataset import DatasetFolder
from pipeline.documents import Manifest
from pipeline.errors import DatasetError
from pipeline.planning.estimate import EncodePlan, Estimate
from pipeline.run_log import RunLog

PLAN = "plan.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One figure."""

    name: str
    planned: Estimate
    actual: float

    @property
    def inside(self) -> bool:
        return self.planned.low <= self.actual <= self.planned.high

    def record(self) -> dict[str, Any]:
        return {"name": self.name, "planned": self.planned.model_dump(), "actual": self.actual, "inside": self.inside}


def read_plan(dataset: DatasetFolder, fingerprint: str) -> EncodePlan | None:
    """The plan in a dataset's folder; None if there is none. DatasetError if it is damaged or of another identity:
    its figures would be held against other work."""
    try:
        content = dataset.store.read_bytes(PLAN)
    except FileNotFoundError:
        return None
    where = dataset.store.full_url(PLAN)
    plan = EncodePlan.from_bytes(content, where)
    if plan.fingerprint != fingerprint:
        raise DatasetError(f"{where}: it was made for identity {plan.fingerprint}, this run has {fingerprint}")
    return plan


def compare(plan: EncodePlan, manifest: Manifest, log: RunLog) -> list[Compared]:
    """Totals of the dataset, and the times of this run if it encoded all of it."""
    compared = compare_totals(plan, manifest)
    if not log.committed_before and len(log.shard_seconds) == len(manifest.shards):
        compared += _times(plan, log)
    return compared


def compare_totals(plan: EncodePlan, manifest: Manifest) -> list[Compared]:
    """Samples, clips, windows, frames, bytes, and rejections by class."""
    counts = manifest.counts
    actual = {
        "clips": counts.clips_encoded,
        "windows": counts.windows_stored,
        "frames": counts.frames_stored,
        "frames decoded": counts.frames_decoded,
        "payload bytes": manifest.payload_bytes,
    }
    compared = [Compared(name="samples", planned=plan.samples, actual=float(counts.samples))]
    compared += [Compared(name=name, planned=plan.totals[name], actual=float(actual[name])) for name in actual]
    unseen = Estimate(low=0.0, value=0.0, high=plan.unseen_class_share * plan.samples.high)
    for name in sorted(plan.rejections.keys() | manifest.rejections.keys()):
        planned, came = plan.rejections.get(name, unseen), manifest.rejections.get(name, 0)
        compared.append(Compared(name=f"rejected {name}", planned=planned, actual=float(came)))
    return compared


def _times(plan: EncodePlan, log: RunLog) -> list[Compared]:
    """Seconds in batches, and from the first shard's begin to the last commit if the plan has that many encoders."""
    encode = sum(seconds.get("encode", 0.0) for seconds in log.shard_seconds.values())
    compared = [Compared(name="encode seconds", planned=plan.encode_seconds, actual=encode)]
    begun = min(at - sum(log.shard_seconds[shard].values()) for shard, at in log.finished_at.items())
    for wall in plan.walls:
        if wall.encoders == log.cluster.get("num_actors"):
            actual = max(log.finished_at.values()) - begun
            compared.append(Compared(name="wall seconds without start-up", planned=wall.seconds, actual=actual))
    return compared
