"""The cache of ranges: right bytes, few reads, a bound that holds for several processes."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reader.cache import RangeCache

CHUNK = 1000
MAX = 64 * CHUNK


def content(number: int, size: int = 10_500) -> bytes:
    return random.Random(number).randbytes(size)


def sizes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*"))


@given(st.lists(st.tuples(st.integers(0, 11_000), st.integers(0, 5_000)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_ranges_are_those_of_the_object(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    cache, data = RangeCache(tmp_path_factory.mktemp("cache"), MAX, chunk_bytes=CHUNK), content(1)
    reads: list[tuple[int, int]] = []

    def fetch(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return data[start:stop]

    for start, length in spans:
        assert cache.read("abc", len(data), start, start + length, fetch) == data[start : start + length]
    fetched = [byte for start, stop in reads for byte in range(start, stop, CHUNK)]
    assert len(fetched) == len(set(fetched))


def test_missing_neighbours_are_one_read(tmp_path: Path) -> None:
    cache, data, reads = RangeCache(tmp_path, MAX, chunk_bytes=CHUNK), content(1), []

    def fetch(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return data[start:stop]

    cache.read("abc", len(data), 3500, 3600, fetch)
    assert cache.read("abc", len(data), 500, 7200, fetch) == data[500:7200]
    assert reads == [(3000, 4000), (0, 3000), (4000, 8000)]


def test_a_file_that_is_not_whole_is_fetched_again(tmp_path: Path) -> None:
    cache, data = RangeCache(tmp_path, MAX, chunk_bytes=CHUNK), content(1)
    for _ in range(2):
        assert cache.read("abc", len(data), 0, 900, lambda start, stop: data[start:stop]) == data[:900]
        (path,) = tmp_path.glob("*/*")
        path.write_bytes(b"half")


def test_a_short_read_is_not_kept(tmp_path: Path) -> None:
    cache = RangeCache(tmp_path, MAX, chunk_bytes=CHUNK)
    assert cache.read("abc", 5000, 0, 2000, lambda _start, _stop: b"x" * 1500) == b"x" * 1500
    assert len(list(tmp_path.glob("*/*"))) == 1


def read_at_random(folder: Path, seed: int) -> None:
    cache, draw, biggest = RangeCache(folder, MAX, chunk_bytes=CHUNK), random.Random(seed), 0
    for turn in range(150):
        number = draw.randrange(20)
        data = content(number)
        start = draw.randrange(len(data))
        stop = draw.randrange(start, len(data)) + 1

        def fetch(first: int, last: int, data: bytes = data) -> bytes:
            return data[first:last]

        assert cache.read(f"{number:04d}", len(data), start, stop, fetch) == data[start:stop]
        if turn % 10 == 0:
            biggest = max(biggest, sizes_now(folder))
    assert biggest <= MAX
    os._exit(0)


def sizes_now(folder: Path) -> int:
    total = 0
    for path in folder.glob("*/*"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process removed it
            continue
    return total


def test_several_processes_stay_within_the_bound(tmp_path: Path) -> None:
    """210 KB of objects through a cache of 64 KB."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=read_at_random, args=(tmp_path, seed)) for seed in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert 0 < sizes(tmp_path) <= MAX


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache, data = RangeCache(tmp_path, MAX, chunk_bytes=CHUNK), content(1, 60 * CHUNK)

    def fetch(start: int, stop: int) -> bytes:
        return data[start:stop]

    for number in range(60):
        cache.read("abc", len(data), number * CHUNK, (number + 1) * CHUNK, fetch)
        os.utime(tmp_path / "ab" / f"abc.{CHUNK}.{number}", (number, number)) if number < 50 else None
    cache.read("other", CHUNK * 10, 0, CHUNK * 10, fetch)
    kept = {int(path.suffix[1:]) for path in (tmp_path / "ab").iterdir()}
    assert set(range(50, 60)) <= kept
    assert 0 not in kept


def test_a_bound_below_64_chunks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cache_bytes: expected at least 64000, got 63999"):
        RangeCache(tmp_path, MAX - 1, chunk_bytes=CHUNK)
