"""One clip on its way through the pool: the meeting point of the thread that consumes and the one that serves.

The serving thread puts items; the consuming thread takes them, which is what a child's credit for more windows is.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.decode.clips import ClipSummary, DecodedWindow
from pipeline.decode.wire import Job
from pipeline.errors import ClipError
from pipeline.records import Clip


@dataclass(frozen=True, slots=True)
class Given:
    window: DecodedWindow


@dataclass(frozen=True, slots=True)
class Voided:
    """What was given so far does not count: another backend starts from the beginning."""


@dataclass(frozen=True, slots=True)
class Ended:
    summary: ClipSummary | None
    error: ClipError | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """Not the clip's fault."""

    error: Exception


Item = Given | Voided | Ended | Failed


class ClipTask:
    """Thread-safe."""

    def __init__(self, clip: Clip, job: Job) -> None:
        self.clip = clip
        self.job = job
        self.attempts = 0
        """Those that came to nothing; the serving thread's."""
        self.items_put = 0
        """Over all attempts; the serving thread's."""
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._wake: Callable[[], None] | None = None
        self._waiting = 0
        self._begun = False
        self._cancelled = False
        self._released = False

    # The consumer's side

    def take(self) -> Item:
        """The next item; blocks."""
        with self._changed:
            self._changed.wait_for(lambda: self._items)
            item = self._items.popleft()
            self._waiting -= isinstance(item, Given)
            wake = self._wake
        if wake is not None and isinstance(item, Given):
            wake()
        return item

    def cancel(self) -> None:
        """Nobody wants the rest. A task that no thread has begun is released at once: its turn may be far off."""
        with self._changed:
            self._cancelled = True
            self._released = self._released or not self._begun
            self._drop_windows()
            wake = self._wake
        if wake is not None:
            wake()

    def wait_released(self) -> None:
        """Block until no thread serves this task or ever will."""
        with self._changed:
            self._changed.wait_for(lambda: self._released)

    # The server's side

    def begin(self, wake: Callable[[], None]) -> bool:
        """Serve this task; `wake` is called when something is taken or cancelled. False if it is cancelled."""
        with self._changed:
            if self._cancelled:
                return False
            self._begun = True
            self._wake = wake
            return True

    def put(self, item: Item) -> None:
        """What was put before is delivered first, whatever it is: the sequence is a function of the clip."""
        self.items_put += 1
        with self._changed:
            if self._cancelled and isinstance(item, Given):
                item.window.pixels.close()
            else:
                self._items.append(item)
                self._waiting += isinstance(item, Given)
            self._changed.notify_all()

    def pause(self) -> None:
        """No thread serves it until one begins again; it is released if it was cancelled meanwhile."""
        with self._changed:
            self._wake = None
            self._begun = False
            self._released = self._cancelled
            self._changed.notify_all()

    def release(self) -> None:
        """The last call of the serving thread."""
        with self._changed:
            self._wake = None
            self._released = True
            self._changed.notify_all()

    @property
    def is_cancelled(self) -> bool:
        with self._changed:
            return self._cancelled

    @property
    def windows_waiting(self) -> int:
        """Windows that nobody has taken yet."""
        with self._changed:
            return self._waiting

    def _drop_windows(self) -> None:
        """Forget the windows nobody has taken yet."""
        for item in [item for item in self._items if isinstance(item, Given)]:
            self._items.remove(item)
            item.window.pixels.close()
        self._waiting = 0
