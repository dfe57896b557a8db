"""Read a source a few samples ahead in a thread, so that a slow GET does not leave the decoders idle."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager

from pipeline.records import Clip, Rejection

Sample = Clip | Rejection
_END = object()


@contextmanager
def prefetched(samples: Iterator[Sample], *, depth: int) -> Iterator[Iterator[Sample]]:
    """An iterator over the same samples that is up to `depth` ahead.

    An error of the source is raised where its sample would have come. On leaving, the thread has ended and the
    Blobs of samples nobody took are closed.
    """
    ready: queue.Queue[object] = queue.Queue(maxsize=depth)
    leaving = threading.Event()
    thread = threading.Thread(target=_fill, args=(samples, ready, leaving), name="read-ahead", daemon=True)
    thread.start()
    try:
        yield _drain(ready)
    finally:
        leaving.set()
        while thread.is_alive():
            _close_waiting(ready)
            thread.join(timeout=0.05)
        _close_waiting(ready)


def _fill(samples: Iterator[Sample], ready: queue.Queue[object], leaving: threading.Event) -> None:
    last: object = _END
    try:
        for sample in samples:
            if not _put(ready, sample, leaving):
                return
    except BaseException as error:  # noqa: BLE001 - raised again in the consumer's thread
        last = error
    finally:
        if isinstance(samples, Generator):
            samples.close()  # its stream, now rather than when it is collected
    _put(ready, last, leaving)


def _put(ready: queue.Queue[object], item: object, leaving: threading.Event) -> bool:
    while not leaving.is_set():
        try:
            ready.put(item, timeout=0.1)
        except queue.Full:
            continue
        return True
    _close(item)
    return False


def _drain(ready: queue.Queue[object]) -> Iterator[Sample]:
    while (item := ready.get()) is not _END:
        if isinstance(item, BaseException):
            raise item
        assert isinstance(item, Clip | Rejection)
        yield item


def _close_waiting(ready: queue.Queue[object]) -> None:
    while True:
        try:
            _close(ready.get_nowait())
        except queue.Empty:
            return


def _close(item: object) -> None:
    if isinstance(item, Clip):
        item.video.close()
