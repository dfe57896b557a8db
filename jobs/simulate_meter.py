"""Processor time and memory of a run's processes, by what they are: this driver, Ray's own, the encode actors."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import psutil

SAMPLE_SECONDS = 2.0
ACTOR_MEMORY_SAMPLES = 4
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Processor seconds per kind of process since each began, and the driver's memory."""

    monotonic: float
    shards: int
    cpu_seconds: dict[str, float]
    driver_mib: float


@dataclass(slots=True)
class ProcessMeter:
    """Samples while it is entered; the caller says when a shard is committed."""

    shards: int = 0
    samples: list[Snapshot] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    first_commit: float | None = None
    actor_mib: float | None = None
    """Memory of the largest of a few actors at the first commit."""
    _leaving: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._thread = threading.Thread(target=self._sample_for_ever, name="meter", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        if self._thread is not None:
            self._thread.join()

    def committed(self) -> None:
        self.shards += 1
        if self.first_commit is None:
            self.first_commit = time.monotonic()
            self.actor_mib = max(actor_mib(), default=None)
            self.sample()

    def sample(self) -> None:
        self.samples.append(self._snapshot())

    def steady(self) -> tuple[Snapshot, Snapshot]:
        """The samples that bound the steady state: after a tenth of the shards (imports, first calls), and the last
        that found actors, which go as soon as Ray has no more work for them; in a short run, the last of all."""
        working = [sample for sample in self.samples if sample.shards]
        total = working[-1].shards
        alive = [sample for sample in working if "actors" in sample.cpu_seconds and sample.shards > total // 2]
        last = alive[-1] if alive else working[-1]
        return next((s for s in working if total // 10 <= s.shards < last.shards), working[0]), last

    def _sample_for_ever(self) -> None:
        while not self._leaving.wait(SAMPLE_SECONDS):
            self.sample()

    def _snapshot(self) -> Snapshot:
        driver = psutil.Process()
        cpu = {"driver": _cpu_seconds(driver)}
        for process in driver.children(recursive=True):
            with suppress(psutil.Error):
                kind = kind_of(process)
                cpu[kind] = cpu.get(kind, 0.0) + _cpu_seconds(process)
        return Snapshot(time.monotonic(), self.shards, cpu, driver.memory_info().rss / _MIB)


def kind_of(process: psutil.Process) -> str:
    """ "gcs", "raylet", "actors", "monitor" or "other", by name and title."""
    name = process.name()
    if name in ("raylet", "gcs_server"):
        return name.removesuffix("_server")
    title = " ".join(process.cmdline())
    if "EncodeShards" in title:
        return "actors"
    return "monitor" if "RunMonitor" in title else "other"


def actor_mib() -> list[float]:
    """Proportional memory of a few encode actors under this process."""
    sizes: list[float] = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if len(sizes) < ACTOR_MEMORY_SAMPLES and kind_of(process) == "actors":
                sizes.append(process.memory_full_info().pss / _MIB)
    return sizes


def _cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
