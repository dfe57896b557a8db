"""Frames per second in steady state, computed alike for a bare loop and for a run of the encode job."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.documents import ShardReceipt


@dataclass(frozen=True, slots=True)
class ShardSpan:
    """One shard's work. Times in seconds on one clock."""

    start: float
    end: float
    frames: int
    """Of the windows stored."""
    encode_seconds: float
    """Time its batches spent in the VAE."""


@dataclass(frozen=True, slots=True)
class SteadyRate:
    """What happened between the end of the first shard and the end of the last one."""

    frames: float
    seconds: float
    encode_seconds: float

    @classmethod
    def of(cls, spans: Sequence[ShardSpan]) -> SteadyRate:
        """ValueError with fewer than two shards.

        Several shards may be under way when the first one ends. What was done of them before then is left out: a
        shard counts with the share of its time that lies inside. Counting them whole would add a shard per actor.
        """
        if len(spans) < 2:
            raise ValueError(f"expected at least two shards, got {len(spans)}")
        first, last = min(span.end for span in spans), max(span.end for span in spans)
        shares = [(span, (span.end - max(span.start, first)) / (span.end - span.start)) for span in spans]
        inside = [(span, share) for span, share in shares if share > 0]
        return cls(
            frames=sum(share * span.frames for span, share in inside),
            seconds=last - first,
            encode_seconds=sum(share * span.encode_seconds for span, share in inside),
        )

    @property
    def per_second(self) -> float:
        return self.frames / self.seconds

    def encode_share(self, num_encoders: int) -> float:
        """The part of the time in which an encoder was busy, on average over the encoders."""
        return self.encode_seconds / (self.seconds * num_encoders)


def spans_of_run(output: Path) -> tuple[float, list[ShardSpan]]:
    """When the one run of a local dataset started (Unix time), and its shards in seconds from then.

    A shard ends with its receipt. It began as long before as its stages took together: they follow each other.
    """
    (path,) = (output / "runs").glob("*.json")
    report = json.loads(path.read_text())
    spans = []
    for shard_id, end in report["committed_after_seconds"].items():
        receipt = ShardReceipt.from_bytes((output / "receipts" / f"{shard_id}.json").read_bytes(), shard_id)
        stages: dict[str, float] = report["shard_seconds"][shard_id]
        spans.append(
            ShardSpan(
                start=end - sum(stages.values()),
                end=end,
                frames=receipt.counts.frames_stored,
                encode_seconds=stages.get("encode", 0.0),
            )
        )
    return report["started_unix"], spans
