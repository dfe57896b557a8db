"""Read-ahead: the same samples, errors in their place, at most `depth` ahead, and nothing left behind."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.decode.blob import Blob
from pipeline.prefetch import prefetched
from pipeline.records import Clip, Rejection


def clip(number: int) -> Clip:
    return Clip(
        key=str(number),
        shard_id="0",
        video=Blob.from_bytes(b"x"),
        video_sha256="",
        file_name="",
        caption="",
        metadata={},
    )


def rejection(number: int) -> Rejection:
    return Rejection(key=str(number), shard_id="0", scope="clip", stage="read", error_class="no_video", message="")


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    threads, descriptors = threading.active_count(), open_descriptors()
    yield
    assert threading.active_count() == threads
    assert open_descriptors() == descriptors


@pytest.mark.parametrize("depth", [1, 2, 50])
def test_the_same_samples_in_order(depth: int) -> None:
    with prefetched((rejection(n) for n in range(20)), depth=depth) as ahead:
        assert [one.key for one in ahead] == [str(n) for n in range(20)]
        assert next(ahead, None) is None


def test_an_error_comes_where_its_sample_would_have() -> None:
    def broken() -> Iterator[Rejection]:
        yield rejection(0)
        yield rejection(1)
        raise OSError("the store is gone")

    with prefetched(broken(), depth=5) as ahead:
        assert [next(ahead).key, next(ahead).key] == ["0", "1"]
        with pytest.raises(OSError, match="the store is gone"):
            next(ahead)


@pytest.mark.parametrize("depth", [1, 3])
def test_it_is_ahead_by_depth_and_no_more(depth: int) -> None:
    begun = []

    def slow_to_take() -> Iterator[Rejection]:
        for number in range(100):
            begun.append(number)
            yield rejection(number)

    with prefetched(slow_to_take(), depth=depth) as ahead:
        next(ahead)
        deadline = time.monotonic() + 5
        while len(begun) < depth + 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.15)
        assert len(begun) == depth + 2, "one taken, `depth` waiting, one in hand"


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_leaving_early_closes_what_nobody_took(taken: int) -> None:
    closed = threading.Event()
    made: list[Clip] = []

    def endless() -> Iterator[Clip]:
        try:
            while True:
                made.append(clip(len(made)))
                yield made[-1]
        finally:
            closed.set()

    source = endless()
    with prefetched(source, depth=2) as ahead:
        mine = [next(ahead) for _ in range(taken)]
    assert closed.is_set(), "the source's generator is closed: its stream, too"
    assert not any(isinstance(one, Rejection) for one in mine)
    for one in made[:taken]:
        assert one.video.fd >= 0, "what was taken is the taker's"
        one.video.close()
    for one in made:
        with pytest.raises(ValueError, match="closed"):
            _ = one.video.fd


def test_an_error_in_the_consumer_passes() -> None:
    def consume() -> None:
        with prefetched((clip(n) for n in range(100)), depth=2) as ahead:
            first = next(ahead)
            assert isinstance(first, Clip)
            first.video.close()
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        consume()


def test_a_source_that_hangs_only_holds_up_its_own_end() -> None:
    """Leaving waits for the read in progress; it does not abandon a thread that still uses the source."""
    release = threading.Event()

    def slow() -> Iterator[Rejection]:
        yield rejection(0)
        release.wait(10)
        yield rejection(1)

    threading.Timer(0.2, release.set).start()
    began = time.monotonic()
    with prefetched(slow(), depth=1) as ahead:
        next(ahead)
    assert 0.1 < time.monotonic() - began < 5
