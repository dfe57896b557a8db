"""Times and rates of one run: what runs/ID.json says, while the run goes on and when it has ended.

Nothing of it is in the dataset's own documents. While the run goes on the file is short, however many shards there
are, and is written again every `BEAT_SECONDS`: it is how `latents status` knows of a run without its cluster.
"""

from __future__ import annotations

import heapq
import platform
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

BEAT_SECONDS = 30.0
SHOWN_SHARDS = 10


@dataclass(slots=True)
class RunLog:
    """Filled by many threads while a run goes on."""

    run_id: str = field(
        default_factory=lambda: f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
    )
    started: float = field(default_factory=time.time)
    shards_total: int | None = None
    committed_before: int = 0
    cluster: dict[str, Any] = field(default_factory=dict)
    shard_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    finished_at: dict[str, float] = field(default_factory=dict)
    set_aside: list[str] = field(default_factory=list)
    plan_against_actual: list[dict[str, Any]] = field(default_factory=list)
    """Where the dataset had a plan.json."""
    _slowest: list[tuple[float, str]] = field(default_factory=list)
    _guard: Any = field(default_factory=threading.Lock)

    def note(self, shard_id: str, seconds: dict[str, float]) -> None:
        """A shard was committed; `seconds` per stage."""
        with self._guard:
            self.shard_seconds[shard_id] = {name: round(value, 3) for name, value in seconds.items()}
            self.finished_at[shard_id] = round(time.time() - self.started, 3)
            heapq.heappush(self._slowest, (round(sum(seconds.values()), 3), shard_id))
            if len(self._slowest) > SHOWN_SHARDS:
                heapq.heappop(self._slowest)

    def pulse(self, under_way: Mapping[str, float]) -> dict[str, Any]:
        """The file of a run that goes on; `under_way` is the seconds since each shard in work was begun."""
        longest = heapq.nlargest(SHOWN_SHARDS, under_way.items(), key=lambda pair: pair[1])
        return self._head("running") | {"under_way": [[name, round(seconds, 1)] for name, seconds in longest]}

    def report(self, outcome: str) -> dict[str, Any]:
        """The file of a run that has ended, with the times of every shard."""
        return self._head(outcome) | {
            "shard_seconds": self.shard_seconds,
            "committed_after_seconds": self.finished_at,
            "set_aside": self.set_aside,
            "plan_against_actual": self.plan_against_actual,
        }

    def _head(self, outcome: str) -> dict[str, Any]:
        now = time.time()
        with self._guard:
            slowest = [[name, seconds] for seconds, name in sorted(self._slowest, reverse=True)]
            committed = len(self.finished_at)
        return {
            "run_id": self.run_id,
            "started_unix": round(self.started, 3),
            "written_unix": round(now, 3),
            "wall_seconds": round(now - self.started, 3),
            "outcome": outcome,
            "driver_host": platform.node(),
            "cluster": self.cluster,
            "shards_total": self.shards_total,
            "committed_before": self.committed_before,
            "committed": committed,
            "num_set_aside": len(self.set_aside),
            "slowest_shards": slowest,
        }
