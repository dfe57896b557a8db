"""Resident memory of this process and its children while something runs."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

import psutil

_INTERVAL = 0.05


class PeakMemory:
    """Watches from a thread. `own_growth` and `largest_child` are bytes; memory shared with others does not count."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = _private(self._process)
        self.own_growth = 0
        self.largest_child = 0
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peak-memory", daemon=True)

    def _watch(self) -> None:
        while not self._leaving.wait(_INTERVAL):
            self.own_growth = max(self.own_growth, _private(self._process) - self._before)
            for child in self._process.children(recursive=True):
                self.largest_child = max(self.largest_child, _private(child))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leaving.set()
        self._thread.join()


def _private(process: psutil.Process) -> int:
    try:
        memory = process.memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - getattr(memory, "shared", 0)
