"""What a dataset's documents say, gathered in one pass over the receipts: nothing is decoded here."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from pipeline.dataset import MANIFEST, DatasetFolder
from pipeline.documents import Manifest, ShardReceipt, TileProof
from pipeline.errors import DatasetError
from pipeline.manifest import build_manifest
from pipeline.planning.compare import read_plan
from pipeline.planning.estimate import EncodePlan

EXAMPLES_PER_CLASS = 5


@dataclass(frozen=True, slots=True)
class RunTimes:
    """One run of the encode job, from runs/ID.json."""

    run_id: str
    outcome: str
    wall_seconds: float
    committed: tuple[tuple[float, int], ...]
    """(seconds after the start, frames of that shard), in order of time."""
    stage_seconds: dict[str, float]
    """Over all shards."""

    @property
    def frames(self) -> int:
        return sum(frames for _, frames in self.committed)


@dataclass(slots=True)
class ReceiptFacts:
    """What is kept of the receipts as they pass."""

    examples: dict[str, list[tuple[str, str, str]]] = field(default_factory=dict)
    """By class of rejection: (key, shard, message)."""
    numerics: Counter[str] = field(default_factory=Counter)
    """Shards by the device and threads they were encoded with."""
    proofs: list[tuple[str, TileProof]] = field(default_factory=list)
    """(shard, what the receipt says of its tiles), where it does."""
    frames: dict[str, int] = field(default_factory=dict)
    """Stored frames by shard."""

    def noted(self, receipts: Iterable[ShardReceipt]) -> Iterator[ShardReceipt]:
        """The same receipts, looked at on their way."""
        for receipt in receipts:
            self.frames[receipt.shard_id] = receipt.counts.frames_stored
            self.numerics[f"{receipt.numerics.get('device')}, threads {receipt.numerics.get('threads')}"] += 1
            if receipt.tile_proof is not None:
                self.proofs.append((receipt.shard_id, receipt.tile_proof))
            for rejection in receipt.rejections:
                some = self.examples.setdefault(rejection.error_class, [])
                if len(some) < EXAMPLES_PER_CLASS:
                    some.append((rejection.key or "(rest of the shard)", receipt.shard_id, rejection.message))
            yield receipt


@dataclass(slots=True)
class DatasetFacts:
    """Everything on the page that needs no pixel."""

    url: str
    manifest: Manifest
    """Of an unfinished dataset, what it would be if it ended here."""
    finished: bool
    receipts: ReceiptFacts
    runs: list[RunTimes] = field(default_factory=list)
    plan: EncodePlan | None = None
    notes: list[str] = field(default_factory=list)


def gather(dataset: DatasetFolder) -> DatasetFacts:
    """DatasetError if it is no dataset, or a receipt cannot be read. An unfinished dataset is described as far as it
    goes."""
    finished = dataset.store.info(MANIFEST) is not None
    noted = ReceiptFacts()
    passing = noted.noted(dataset.receipts(dataset.receipt_ids()))
    manifest = build_manifest(dataset.run_file(), passing, dataset.manifest().set_aside if finished else ())
    facts = DatasetFacts(dataset.store.full_url(""), manifest, finished, noted)
    if not finished:
        facts.notes.append(f"Unfinished: there is no {MANIFEST}. What is committed so far is described.")
    facts.runs = list(_runs(dataset, facts))
    facts.plan = _plan(dataset, facts)
    return facts


def _runs(dataset: DatasetFolder, facts: DatasetFacts) -> Iterator[RunTimes]:
    """In order of their start. A document that is not a run's is a note on the page."""
    found: list[tuple[float, RunTimes]] = []
    for name in dataset.store.names("runs", ".json"):
        try:
            report = json.loads(dataset.store.read_bytes(f"runs/{name}"))
            if report["outcome"] == "running":
                facts.notes.append(f"runs/{name}: a run that goes on, or whose driver was killed.")
                continue
            after = sorted((float(at), shard) for shard, at in report["committed_after_seconds"].items())
            stages: Counter[str] = Counter()
            for seconds in report["shard_seconds"].values():
                stages.update({stage: float(value) for stage, value in seconds.items()})
            times = RunTimes(
                run_id=str(report["run_id"]),
                outcome=str(report["outcome"]),
                wall_seconds=float(report["wall_seconds"]),
                committed=tuple((at, facts.receipts.frames.get(shard, 0)) for at, shard in after),
                stage_seconds=dict(stages),
            )
            found.append((float(report["started_unix"]), times))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            facts.notes.append(f"runs/{name} is not a run's report: {type(error).__name__}: {error}")
    yield from (times for _, times in sorted(found, key=lambda one: one[0]))


def _plan(dataset: DatasetFolder, facts: DatasetFacts) -> EncodePlan | None:
    """plan.json, if there is one, it can be read, and it was made for this identity."""
    try:
        return read_plan(dataset, facts.manifest.fingerprint)
    except DatasetError as error:
        facts.notes.append(f"Plan against actual: {error}")
        return None
