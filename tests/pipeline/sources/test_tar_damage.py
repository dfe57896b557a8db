"""Damaged tars: a sample comes whole and equal, or as a Rejection; a damage never passes silently."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.sources.forward import MAX_SINGLE_READ
from tests.pipeline.sources.tar_cases import (
    FUZZ,
    SMALL_END,
    SMALL_TAR,
    Outcome,
    assert_whole_or_rejected,
    header,
    pax,
    sample,
    tar_bytes,
)


def test_a_cut_at_any_block_boundary(read: Callable[..., Outcome], whole: Outcome) -> None:
    for cut in range(0, len(SMALL_TAR), 512):
        outcome = read(SMALL_TAR[:cut])
        assert_whole_or_rejected(outcome, whole)
        assert outcome.is_broken == (cut <= SMALL_END), cut


@FUZZ
@given(cut=st.integers(0, len(SMALL_TAR) - 1))
def test_a_cut_at_any_byte(read: Callable[..., Outcome], whole: Outcome, cut: int) -> None:
    outcome = read(SMALL_TAR[:cut])
    assert_whole_or_rejected(outcome, whole)
    assert outcome.is_broken == (cut <= SMALL_END), "only trailing zeros may be missing in silence"
    if cut < SMALL_END:
        assert "c" not in outcome.clips


flips = st.tuples(st.just("flip"), st.integers(0, SMALL_END - 1), st.integers(0, 7))
splices = st.tuples(st.just("splice"), st.integers(0, SMALL_END - 1), st.integers(0, SMALL_END - 1))
drops = st.tuples(st.just("drop"), st.integers(0, SMALL_END - 1), st.integers(1, 1500))


def damage(data: bytes, changes: list[tuple[str, int, int]]) -> bytes:
    damaged = bytearray(data)
    for kind, where, how in changes:
        if kind == "flip" and where < len(damaged):
            damaged[where] ^= 1 << how
        elif kind == "splice":
            damaged[where:where] = data[how : how + 512]
        elif kind == "drop":
            del damaged[where : where + how]
    return bytes(damaged)


@settings(FUZZ, max_examples=300)
@given(changes=st.lists(flips | splices | drops, min_size=1, max_size=4))
def test_random_damage_never_raises(read: Callable[..., Outcome], changes: list[tuple[str, int, int]]) -> None:
    outcome = read(damage(SMALL_TAR, changes))
    for clip in outcome.clips.values():
        clip.caption.encode("utf-8")
        json.dumps(clip.metadata, allow_nan=False, ensure_ascii=False).encode("utf-8")


@FUZZ
@given(where=st.integers(0, SMALL_END - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_header_is_noticed(
    read: Callable[..., Outcome], whole: Outcome, where: int, bit: int
) -> None:
    with tarfile.open(fileobj=io.BytesIO(SMALL_TAR)) as tar:
        headers = [member.offset for member in tar]
    header = min(headers, key=lambda offset: abs(offset - where))
    outcome = read(damage(SMALL_TAR, [("flip", header + where % 512, bit)]))
    assert_whole_or_rejected(outcome, whole)
    # tarfile's two checksums leave a few bits of the checksum field itself without effect
    assert outcome.is_broken or outcome.clips == whole.clips


DAMAGED = {
    "an empty file": b"",
    "garbage": b"garbage" * 1000,
    "zeros and garbage": bytes(1024) + b"garbage" * 1000,
    "two tars in one": SMALL_TAR + SMALL_TAR,
    "trailing garbage": SMALL_TAR + b"x",
    "no end of archive": SMALL_TAR[:SMALL_END],
    "a gzip": b"\x1f\x8b\x08" + bytes(1000) + b"x",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files(read: Callable[..., Outcome], name: str) -> None:
    outcome = read(DAMAGED[name])
    (broken,) = [r for r in outcome.rejections if r.scope == "shard"]
    assert (broken.error_class, broken.key) == ("truncated_shard", "")
    assert "byte" in broken.message


def test_zeros_only_are_an_empty_archive(read: Callable[..., Outcome]) -> None:
    assert read(tar_bytes([])) == Outcome({}, [], hashlib.sha256(tar_bytes([])).hexdigest())


def test_a_damaged_header_in_the_middle(read: Callable[..., Outcome], whole: Outcome) -> None:
    with tarfile.open(fileobj=io.BytesIO(SMALL_TAR)) as tar:
        second = next(member.offset for member in tar if member.name == "b.txt")
    outcome = read(damage(SMALL_TAR, [("flip", second + 3, 1)]))
    assert outcome.clips == {"a": whole.clips["a"]}
    assert outcome.classes == {"b": "truncated_shard"}, "its caption is what was lost"
    assert f"the header at byte {second} is damaged" in outcome.rejections[-1].message


HOSTILE = {
    "PAX block of 8 GB": header("k", 8 << 30, tarfile.XHDTYPE, base256=True),
    "PAX block over the limit": header("k", MAX_SINGLE_READ + 512, tarfile.XHDTYPE),
    "GNU long name of 8 GB": header("k", 8 << 30, tarfile.GNUTYPE_LONGNAME, base256=True),
    "negative size, backwards": header("k.mp4", -512, base256=True),
    "negative size, one byte": header("k.mp4", -1, base256=True),
    "negative PAX size": pax({"size": "-1536"}),
    "negative PAX block": header("k", -512, tarfile.XHDTYPE, base256=True),
    "PAX size is no number": pax({"size": "many"}),
    "more than the file has": header("k.mp4", 900),
    "endless long names": header("k", 0, tarfile.GNUTYPE_LONGNAME) * 3000,
    "endless PAX blocks": pax({"comment": "x"})[:1024] * 3000,
    "sparse map that runs out": header("k.mp4", 512, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" + bytes(29),
    "sparse 1.0 without a map": pax({"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}),
    "sparse map that is text": pax({"GNU.sparse.map": "a,b"}),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_end_and_cost_no_memory(read: Callable[..., Outcome], name: str) -> None:
    content = tar_bytes(sample("a"))[:3072] + HOSTILE[name] + b"\0" * 512 + b"x"
    tracemalloc.start()
    outcome = read(content)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20
    assert outcome.is_broken
    assert outcome.clips.keys() <= {"a", "k"}


# The sidecar


def write_sidecar(tar: Path, keys: list[str | None], column: str = "key") -> None:
    pq.write_table(pa.table({column: keys, "status": ["success"] * len(keys)}), tar.with_suffix(".parquet"))


def test_keys_that_never_came(read: Callable[..., Outcome], tmp_path: Path) -> None:
    write_sidecar(tmp_path / "00000.tar", ["a", "b", "c", "d", None, "d"])
    assert read(SMALL_TAR).rejections == [], "a whole tar is believed, whatever its sidecar says"
    outcome = read(SMALL_TAR[: SMALL_END - 512])
    assert list(outcome.clips) == ["a", "b"]
    assert outcome.classes == {"c": "truncated_shard", "d": "truncated_shard"}
    assert [(r.key, r.scope) for r in outcome.rejections] == [("c", "clip"), ("", "shard"), ("d", "clip")]


@settings(FUZZ, max_examples=60)
@given(cut=st.integers(0, SMALL_END - 1))
def test_with_a_sidecar_no_sample_of_a_cut_tar_vanishes(
    read: Callable[..., Outcome], tmp_path: Path, cut: int
) -> None:
    write_sidecar(tmp_path / "00000.tar", ["a", "b", "c"])
    outcome = read(SMALL_TAR[:cut])
    assert outcome.clips.keys() | outcome.classes.keys() == {"a", "b", "c"}
    assert outcome.clips.keys().isdisjoint(outcome.classes)


@pytest.mark.parametrize("damaged", ["not parquet", "half", "another column", "zero bytes", "flipped"])
def test_an_unreadable_sidecar_takes_nothing_away(read: Callable[..., Outcome], tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "00000.parquet"
    write_sidecar(tmp_path / "00000.tar", ["a", "z"], column="id" if damaged == "another column" else "key")
    content = path.read_bytes()
    flipped = bytes(b ^ 0xFF if 4 <= n < len(content) - 8 else b for n, b in enumerate(content))
    changed = {"not parquet": b"PK", "half": content[: len(content) // 2], "zero bytes": b"", "flipped": flipped}
    path.write_bytes(changed.get(damaged, content))
    outcome = read(SMALL_TAR[: SMALL_END - 512])
    assert list(outcome.clips) == ["a", "b"]
    assert outcome.is_broken
