"""Says which encoder has stopped moving, and with which shards.

An encoder can be stuck without an error: a store that hangs, a GPU's driver that does not answer, a process that is
stopped. Ray ends the run when nothing at all comes back for cluster.shard_timeout_minutes; until then this is how a
person learns of one that stands among many that go on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.run_monitor import Figures, RunProgress

log = logging.getLogger(__name__)

MOVING = ("frames", "window_frames", "clips_read")
"""Figures that grow while an encoder works."""
SILENT_SECONDS = 60.0


@dataclass(slots=True)
class _Seen:
    figures: tuple[float, ...]
    since: float
    said: float


class StallWatch:
    """Looks at a run's progress again and again; one warning for each encoder that stands, and then for each time
    that it has stood for twice as long."""

    def __init__(self, stalled_seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._stalled_seconds = stalled_seconds
        self._clock = clock
        self._seen: dict[str, _Seen] = {}

    def look(self, progress: RunProgress) -> None:
        """Warn of encoders that have shards in work and have not moved, or not reported, for too long."""
        now = self._clock()
        shards: dict[str, list[str]] = {}
        for shard, under_way in progress.under_way.items():
            shards.setdefault(under_way.encoder_id, []).append(shard)
        for encoder, figures in progress.figures.items():
            seen, moved = self._seen.get(encoder), _moving(figures)
            if seen is None or seen.figures != moved or encoder not in shards:
                self._seen[encoder] = _Seen(moved, now, self._stalled_seconds)
            elif now - seen.since >= seen.said:
                seen.said *= 2
                silent = progress.silent_seconds.get(encoder, 0.0)
                why = "it does not report either" if silent > SILENT_SECONDS else "it reports, but nothing moves"
                log.warning(
                    "encoder stalled: encoder=%s shards=%s seconds=%.0f: %s",
                    *(encoder, ",".join(sorted(shards[encoder])), now - seen.since, why),
                )


def _moving(figures: Figures) -> tuple[float, ...]:
    return tuple(figures.get(name, 0.0) for name in MOVING)
