"""Decode children on other nodes, started by Ray: a second way to fill an encoder's queue.

Each is a Ray task that never ends by itself (`pipeline.decode.relay.serve`), on a node that lends its cores by a
custom resource: plain cores would let the first encoders' children take the room of encoders that are still to start.
The tasks are the encoder's own, so they end with it: Ray cancels them, and their links close. This module imports
neither torch nor ray.data, which every worker process of such a task would have to.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.exceptions import RayError, RayTaskError

from pipeline.decode.link import Invitation
from pipeline.decode.relay import serve

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
PAUSE_SECONDS = 5.0
"""Before a task that has ended is started again."""
MISSED_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteShape:
    """What an encoder's remote decode children ask of the cluster."""

    number: int
    num_cpus: float
    """Cores of each."""
    resource: str
    """Each takes one of it."""


def node_address() -> str:
    """This node's address, as the other nodes of the cluster see it."""
    return ray.util.get_node_ip_address()


class RemoteDecoders:
    """Keeps `shape.number` such tasks running or waiting for room."""

    def __init__(self, invitation: Invitation, shape: RemoteShape, present: Callable[[], int]) -> None:
        """`present` is how many of their children the pool has now."""
        options = {"num_cpus": shape.num_cpus, "resources": {shape.resource: 1}, "max_retries": 0}
        self._task = ray.remote(serve).options(**options, scheduling_strategy="SPREAD", name="decode-elsewhere")
        self._invitation = invitation
        self._shape = shape
        self._present = present
        self._running: list[ray.ObjectRef] = []
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="remote-decode", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End those that run, and take back those that wait for room."""
        self._closing.set()
        self._thread.join()
        for task in self._running:
            ray.cancel(task)

    def _keep(self) -> None:
        missed = _Missed(self._shape)
        while not self._closing.is_set():
            while len(self._running) < self._shape.number:
                self._running.append(self._task.remote(self._invitation))
            ended, self._running = ray.wait(self._running, num_returns=self._shape.number, timeout=LOOK_SECONDS)
            if ended and not self._closing.is_set():
                why = {_why_ended(task) for task in ended}
                log.warning(
                    "remote decoders ended, started again: number=%d why=%s", len(ended), "; ".join(sorted(why))
                )
                self._closing.wait(PAUSE_SECONDS)
            missed.look(self._present())


def _why_ended(task: ray.ObjectRef) -> str:
    try:
        ray.get(task)
    except RayTaskError as error:
        return str(error.cause).strip()
    except RayError as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "its link was lost"


class _Missed:
    """Says that children are missing, and again each time that it has been so for twice as long."""

    def __init__(self, shape: RemoteShape) -> None:
        self._shape = shape
        self._since: float | None = None
        self._said = MISSED_SECONDS

    def look(self, present: int) -> None:
        now = time.monotonic()
        if present >= self._shape.number:
            self._since, self._said = None, MISSED_SECONDS
            return
        self._since = self._since or now
        if now - self._since >= self._said:
            self._said *= 2
            log.warning(
                "remote decoders are missing: present=%d wanted=%d seconds=%.0f each_needs=%g CPU and 1 %r of a node",
                *(present, self._shape.number, now - self._since, self._shape.num_cpus, self._shape.resource),
            )
