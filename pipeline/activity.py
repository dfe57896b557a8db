"""What an encode actor does and waits for, as running figures: for the terminal, the run's watch and Prometheus.

The encoder is one; two shards are in work around it. Whenever it is idle, what the shards are at is why: their clips
are still being decoded, or they are written and stored while no other shard is there to encode.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from pipeline.documents import ShardReceipt

ENCODE, SHARD = "encode", "shard"
_REASONS = {"wait for decode": "decode", "write": "store", "store": "store"}
"""What a shard is at, and what an idle encoder waits for then; the first one that holds counts."""
STATES = ("encode", "decode", "store", "other", "no_shard")


class EncoderActivity:
    """Seconds of one encoder by what it did or waited for, and counts of what came of it. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._guard = threading.Lock()
        self._active: Counter[str] = Counter()
        self._seconds: dict[str, float] = dict.fromkeys(STATES, 0.0)
        self._counts: defaultdict[str, float] = defaultdict(float)
        self._since = clock()

    @contextmanager
    def during(self, stage: str) -> Iterator[None]:
        """A shard, or a stage of one, goes on while the body runs."""
        self._change(stage, 1)
        try:
            yield
        finally:
            self._change(stage, -1)

    def count(self, name: str, number: float = 1) -> None:
        """Add to a running count: "shards", "retries.clip", "rejections.timeout"."""
        with self._guard:
            self._counts[name] += number

    def count_receipt(self, receipt: ShardReceipt) -> None:
        """What became of a stored shard."""
        self.count("shards")
        self.count("samples", receipt.counts.samples)
        self.count("payload_bytes", receipt.payload.size)
        for name, number in receipt.rejected_by_class().items():
            self.count(f"rejections.{name}", number)

    def figures(self) -> dict[str, float]:
        """Counts by name, and the seconds up to now as "state.NAME"."""
        with self._guard:
            self._pass_time()
            states = {f"state.{name}": seconds for name, seconds in self._seconds.items()}
            return {**states, **self._counts}

    def _change(self, stage: str, by: int) -> None:
        with self._guard:
            self._pass_time()
            self._active[stage] += by

    def _pass_time(self) -> None:
        now = self._clock()
        self._seconds[self._state()] += now - self._since
        self._since = now

    def _state(self) -> str:
        if self._active[ENCODE]:
            return "encode"
        for stage, reason in _REASONS.items():
            if self._active[stage]:
                return reason
        return "other" if self._active[SHARD] else "no_shard"
