"""ForwardReader against io.BytesIO: the same bytes for the same calls, and a hash of the whole stream."""

from __future__ import annotations

import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.forward import MAX_SINGLE_READ, ForwardReader

KEPT = 4096
DATA = b"".join(hashlib.sha256(bytes([n])).digest() for n in range(256)) * 4  # 32 KiB


class Trickle:
    """A stream that gives less than it is asked for, as sockets do."""

    def __init__(self, data: bytes, at_most: int) -> None:
        self._file = io.BytesIO(data)
        self._at_most = at_most

    def read(self, size: int = -1) -> bytes:
        return self._file.read(min(size, self._at_most))


moves = st.tuples(st.sampled_from(["read", "forward", "back"]), st.integers(0, KEPT + 1500))


@settings(max_examples=300)
@given(st.lists(moves, max_size=30), st.integers(1, 9000))
def test_it_reads_like_a_file(calls: list[tuple[str, int]], at_most: int) -> None:
    reader, file, furthest = ForwardReader(Trickle(DATA, at_most)), io.BytesIO(DATA), 0
    for kind, size in calls:
        position = file.tell()
        if kind == "read":
            assert reader.read(size) == file.read(size)
        elif kind == "forward":
            file.seek(min(position + size, len(DATA)))
            assert reader.seek(position + size) == file.tell(), "seeking past the end stops there"
        elif position - size >= max(0, furthest - KEPT):
            file.seek(position - size)
            reader.seek(position - size)
        elif size <= position:
            with pytest.raises(io.UnsupportedOperation, match="cannot seek back"):
                reader.seek(position - size)
        furthest = max(furthest, file.tell())
        assert reader.tell() == file.tell()
    rest = DATA[file.tell() :]
    assert reader.drain() == (len(rest), not rest.strip(b"\0"))
    assert reader.sha256 == hashlib.sha256(DATA).hexdigest(), "every byte once, whatever was read twice"


@pytest.mark.parametrize(
    ("rest", "only_zeros"), [(b"", True), (b"\0" * 3_000_000, True), (b"\0" * 2_000_000 + b"x", False)]
)
def test_drain_says_whether_all_were_zero(rest: bytes, only_zeros: bool) -> None:
    reader = ForwardReader(io.BytesIO(b"head" + rest))
    reader.read(4)
    assert reader.drain() == (len(rest), only_zeros)


@pytest.mark.parametrize("size", [-1, MAX_SINGLE_READ + 1])
def test_a_hostile_size_is_refused_before_memory_is_taken(size: int) -> None:
    with pytest.raises(tarfile.ReadError, match="refusing to read"):
        ForwardReader(io.BytesIO(b"abc")).read(size)


def test_only_absolute_seeks() -> None:
    with pytest.raises(io.UnsupportedOperation):
        ForwardReader(io.BytesIO(b"abc")).seek(0, io.SEEK_END)
