"""Make items a few ahead in a thread: a slow GET must not leave the decoders idle, nor decoding the trainer."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.records import Clip

Item = TypeVar("Item")
_END = object()


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


def close_clip(item: object) -> None:
    """Give the bytes of a Clip back; others have none."""
    if isinstance(item, Clip):
        item.video.close()


@contextmanager
def prefetched(
    items: Iterator[Item], *, depth: int, close: Callable[[Item], None] = close_clip
) -> Iterator[Iterator[Item]]:
    """An iterator over the same items that is up to `depth` ahead.

    An error of the source is raised where its item would have come. On leaving, the thread has ended and `close` was
    called with the items nobody took.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    leaving = threading.Event()
    thread = threading.Thread(target=_fill, args=(items, ready, leaving, close), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield _drain(ready)
    finally:
        leaving.set()
        while thread.is_alive():
            _close_waiting(ready, close)
            thread.join(timeout=0.05)
        _close_waiting(ready, close)


def _fill(
    items: Iterator[Item], ready: queue.Queue[object], leaving: threading.Event, close: Callable[[Item], None]
) -> None:
    last: object = _END
    try:
        for item in items:
            if not _put(ready, item, leaving):
                close(item)
                return
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
        last = _Failed(error)
    finally:
        if isinstance(items, Generator):
            items.close()  # its stream, now rather than when it is collected
    _put(ready, last, leaving)


def _put(ready: queue.Queue[object], item: object, leaving: threading.Event) -> bool:
    while not leaving.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    return False


def _drain(ready: queue.Queue[object]) -> Iterator[Any]:
    while (item := ready.get()) is not _END:
        if isinstance(item, _Failed):
            raise item.error
        yield item


def _close_waiting(ready: queue.Queue[object], close: Callable[[Any], None]) -> None:
    while True:
        try:
            item = ready.get_nowait()
        except queue.Empty:
            return
        if item is not _END and not isinstance(item, _Failed):
            close(item)
