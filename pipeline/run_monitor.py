"""What the driver knows of its encoders while they work: attempts per shard, what is under way, how far each is.

Plain Python; pipeline/dataflow.py makes an actor of it that runs beside the driver.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class ShardUnderWay:
    """A shard that was begun and has not ended."""

    encoder_id: str
    seconds: float
    """Since it was begun."""


@dataclass(frozen=True, slots=True)
class RunProgress:
    """One look at the monitor."""

    figures: dict[str, Figures] = field(default_factory=dict)
    """The last figures of each encoder."""
    silent_seconds: dict[str, float] = field(default_factory=dict)
    """Since each encoder's last report."""
    under_way: dict[str, ShardUnderWay] = field(default_factory=dict)


class RunMonitor:
    """Attempts per shard and how far each encoder is."""

    def __init__(self) -> None:
        self._attempts: dict[str, int] = {}
        self._begun: dict[str, tuple[str, float]] = {}
        self._figures: dict[str, Figures] = {}
        self._heard: dict[str, float] = {}

    def attempts(self, shard_id: str) -> int:
        """How often the shard was begun without an end."""
        return self._attempts.get(shard_id, 0)

    def begin(self, shard_id: str, encoder_id: str = "") -> None:
        self._attempts[shard_id] = self.attempts(shard_id) + 1
        self._begun[shard_id] = encoder_id, time.monotonic()

    def end(self, shard_id: str) -> None:
        self._attempts.pop(shard_id, None)
        self._begun.pop(shard_id, None)

    def report(self, encoder_id: str, figures: Figures) -> None:
        self._figures[encoder_id] = figures
        self._heard[encoder_id] = time.monotonic()

    def progress(self) -> RunProgress:
        now = time.monotonic()
        return RunProgress(
            figures=dict(self._figures),
            silent_seconds={encoder: now - heard for encoder, heard in self._heard.items()},
            under_way={shard: ShardUnderWay(encoder, now - at) for shard, (encoder, at) in self._begun.items()},
        )
