"""Reading WebDataset tars: every layout, every damage. A sample comes whole and equal, or as a Rejection; a damage
never passes silently."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import os
import tarfile
import tracemalloc
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError, SourceChanged, SourceError
from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources import SourceDigest, WebDatasetSource, plan_source, read_shard
from pipeline.sources import tar as tar_source
from pipeline.sources.forward import MAX_SINGLE_READ
from pipeline.storage import ObjectInfo, Store, object_info
from tests.s3_server import Fault, S3Server, proxy_to

Member = tuple[str, bytes] | tarfile.TarInfo
FUZZ = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tar_bytes(members: Iterable[Member], *, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, errors="surrogateescape") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            info = tarfile.TarInfo(member[0])
            info.size = len(member[1])
            tar.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def sample(key: str, *, video: bytes | None = b"video", text: str | None = "words", **metadata: Any) -> list[Member]:
    """A sample in video2dataset's member order."""
    members: list[Member] = [(f"{key}.json", json.dumps({"key": key, **metadata}).encode())]
    if video is not None:
        members.append((f"{key}.mp4", video))
    if text is not None:
        members.append((f"{key}.txt", text.encode()))
    return members


@dataclass(frozen=True)
class ReadClip:
    """A Clip whose Blob was read and closed."""

    key: str
    video: bytes
    caption: str
    metadata: dict[str, Any]
    file_name: str


@dataclass(frozen=True)
class Outcome:
    clips: dict[str, ReadClip]
    rejections: list[Rejection]
    sha256: str | None

    @property
    def classes(self) -> dict[str, str]:
        """Error class by key, of clips."""
        return {r.key: r.error_class for r in self.rejections if r.scope == "clip"}

    @property
    def is_broken(self) -> bool:
        return any(r.scope == "shard" for r in self.rejections)


def read_url(url: str, *, max_clip_bytes: int = 1 << 30, planned: VideoShard | None = None, **spec: Any) -> Outcome:
    digest = SourceDigest()
    shard = planned or VideoShard(id="00000", kind="webdataset", url=url)
    samples = read_shard(shard, WebDatasetSource(urls=url, **spec), max_clip_bytes=max_clip_bytes, digest=digest)
    clips, rejections = {}, []
    for one in samples:
        if isinstance(one, Rejection):
            assert one.shard_id == "00000"
            json.dumps(one.message + one.key, ensure_ascii=False).encode("utf-8")  # it is stored
            rejections.append(one)
            continue
        with one.video as blob:
            video = os.pread(blob.fd, blob.size, 0)
        assert one.video_sha256 == hashlib.sha256(video).hexdigest()
        assert one.key not in clips, "a key comes once"
        clips[one.key] = ReadClip(one.key, video, one.caption, one.metadata, one.file_name)
    return Outcome(clips, rejections, digest.sha256)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Outcome]:
    """Read a tar given as bytes or as members."""

    def read_tar(content: bytes | Iterable[Member], **options: Any) -> Outcome:
        data = content if isinstance(content, bytes) else tar_bytes(content)
        path = tmp_path / "00000.tar"
        path.write_bytes(data)
        outcome = read_url(str(path), **options)
        assert outcome.sha256 == hashlib.sha256(data).hexdigest(), "of the whole file, damaged or not"
        return outcome

    return read_tar


# Layouts


def test_video2dataset_shards(v2d_shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    """As video2dataset writes them, failed downloads among them: those are upstream's failures, not ours."""
    tars = v2d_shards(tmp_path, num_shards=1, good=3, failed=2, broken=1)
    outcome = read_url(str(tars[0]))
    assert [clip.caption != "" for clip in outcome.clips.values()] == [True] * 4, (
        "whether it decodes is not asked here"
    )
    assert [r.error_class for r in outcome.rejections] == ["upstream_failed"] * 2
    assert all("HTTP Error 404" in r.message and r.stage == "read" for r in outcome.rejections)
    with tarfile.open(tars[0]) as tar:
        for clip in outcome.clips.values():
            file = tar.extractfile(clip.file_name)
            assert file is not None
            assert file.read() == clip.video
            assert clip.metadata["key"] == clip.key


def test_whole_samples(read: Callable[..., Outcome]) -> None:
    outcome = read([*sample("a", video=b"1", text="one", n=1), *sample("b", video=b"", text="", status="success")])
    assert outcome.rejections == []
    assert outcome.clips["a"] == ReadClip("a", b"1", "one", {"key": "a", "n": 1}, "a.mp4")
    assert outcome.clips["b"].video == b""


LAYOUTS: dict[str, tuple[list[Member], str]] = {
    "failed download": (sample("k", video=None, status="failed_to_download", error_message="404"), "upstream_failed"),
    "failed, yet with a video": (sample("k", status="failed_to_subsample"), "upstream_failed"),
    "status is null": (sample("k", status=None), "clip"),
    "no video": (sample("k", video=None), "no_video"),
    "text only": ([("k.txt", b"words")], "no_video"),
    "no known video extension": ([("k.xyz", b"?"), ("k.txt", b"words")], "no_video"),
    "two dots": ([("k.en.mp4", b"video"), ("k.txt", b"words")], "no_video"),
    "video only": ([("k.mp4", b"video")], "clip"),
    "upper case": ([("k.MP4", b"video"), ("k.TXT", b"words")], "clip"),
    "json is not JSON": ([("k.json", b"{"), ("k.mp4", b"video")], "bad_metadata"),
    "json is a list": ([("k.json", b"[1]"), ("k.mp4", b"video")], "bad_metadata"),
    "json is text": ([("k.json", b'"a"'), ("k.mp4", b"video")], "bad_metadata"),
    "json is empty": ([("k.json", b""), ("k.mp4", b"video")], "bad_metadata"),
    "json is not UTF-8": ([("k.json", b'{"a": "\xff"}'), ("k.mp4", b"video")], "bad_metadata"),
    "json with half a surrogate pair": ([("k.json", b'{"caption": "\\ud83d"}'), ("k.mp4", b"video")], "bad_metadata"),
    "json nests too deep": ([("k.json", b"[" * 100_000), ("k.mp4", b"video")], "bad_metadata"),
    "caption is not UTF-8": ([("k.txt", b"caf\xe9"), ("k.mp4", b"video")], "bad_caption"),
    "too large": (sample("k", video=b"x" * 1001), "too_large"),
    "as large as allowed": (sample("k", video=b"x" * 1000), "clip"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(read: Callable[..., Outcome], name: str) -> None:
    """Between two good samples, so that nothing of one leaks into another."""
    members, expected = LAYOUTS[name]
    outcome = read([*sample("before"), *members, *sample("zafter")], max_clip_bytes=1000)
    assert {"before", "zafter"} <= outcome.clips.keys()
    found = "clip" if "k" in outcome.clips else outcome.classes["k"]
    assert found == expected
    assert len(outcome.clips) + len(outcome.rejections) == 3


def test_numbers_that_json_does_not_have_become_null(read: Callable[..., Outcome]) -> None:
    raw = b'{"a": NaN, "b": -Infinity, "c": 1e999, "d": [1.5, NaN], "e": 12345678901234567890}'
    outcome = read([("k.json", raw), ("k.mp4", b"video")])
    assert outcome.clips["k"].metadata == {
        "a": None,
        "b": None,
        "c": None,
        "d": [1.5, None],
        "e": 12345678901234567890,
    }


@pytest.mark.parametrize(
    ("text", "metadata", "caption"),
    [
        ("from txt", {"caption": "from caption", "name": "from name"}, "from txt"),
        ("", {"caption": "from caption"}, ""),
        (None, {"caption": "from caption", "name": "from name"}, "from caption"),
        (None, {"caption": None, "name": "from name"}, "from name"),
        (None, {"caption": 5, "name": "from name"}, "from name"),
        (None, {"name": "from name"}, "from name"),
        (None, {}, ""),
        ("zwei\nZeilen ☃\n", {}, "zwei\nZeilen ☃\n"),
    ],
)
def test_caption_precedence(
    read: Callable[..., Outcome], text: str | None, metadata: dict[str, Any], caption: str
) -> None:
    assert read(sample("k", text=text, **metadata)).clips["k"].caption == caption


def test_caption_keys_are_configurable(read: Callable[..., Outcome]) -> None:
    assert (
        read(sample("k", text=None, caption="no", prompt="yes"), caption_keys=("prompt",)).clips["k"].caption == "yes"
    )


DUPLICATES = {
    "adjacent samples": [*sample("k", text="first"), *sample("k", text="second")],
    "apart": [*sample("k", text="first"), *sample("other"), *sample("k", text="second")],
    "a member twice": [("k.txt", b"first"), ("k.mp4", b"video"), ("k.mp4", b"again")],
    "a member that comes late": [("k.mp4", b"video"), ("k.txt", b"first"), *sample("other"), ("k.json", b"{}")],
    "by case": [("k.mp4", b"video"), ("k.txt", b"first"), ("k.MP4", b"again")],
}


@pytest.mark.parametrize("name", DUPLICATES)
def test_duplicate_keys(read: Callable[..., Outcome], name: str) -> None:
    outcome = read(DUPLICATES[name])
    assert outcome.clips["k"].caption == "first"
    assert outcome.clips["k"].video == b"video"
    assert outcome.classes == {"k": "duplicate_key"}


@pytest.mark.parametrize(
    "name",
    ["../k", "a/../k", "/k", "a//k", "..//k", "a\nb", "a\x01", "a\\b", "x" * 201, "caf\udce9", "a\u0085b"],
)
def test_unsafe_keys(read: Callable[..., Outcome], name: str) -> None:
    outcome = read([(f"{name}.mp4", b"video"), *sample("fine")])
    assert list(outcome.clips) == ["fine"]
    assert [r.error_class for r in outcome.rejections] == ["unsafe_key"]


def test_keys_with_folders(read: Callable[..., Outcome]) -> None:
    outcome = read(
        [*sample("a/k"), *sample("b/k"), ("./c.mp4", b"video"), ("./d/e.mp4", b"video"), ("v1.2/f.mp4", b"")]
    )
    assert outcome.rejections == []
    assert list(outcome.clips) == ["a/k", "b/k", "c", "d/e", "v1.2/f"], "`tar -C folder .` puts ./ before each name"
    assert outcome.clips["c"].file_name == "./c.mp4"


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_what_is_no_sample_is_ignored(read: Callable[..., Outcome]) -> None:
    noise: list[Member] = [
        (".DS_Store", b"x"),
        ("._k.mp4", b"AppleDouble"),
        ("a/.hidden.mp4", b"x"),
        ("README", b"no extension"),
        special("folder.mp4", tarfile.DIRTYPE),
        special("v1.2", tarfile.DIRTYPE),
        special("link", tarfile.SYMTYPE, "k.mp4"),
    ]
    outcome = read([noise[0], *sample("k"), *noise[1:], *sample("l")])
    assert list(outcome.clips) == ["k", "l"]
    assert outcome.rejections == []


def test_a_sample_that_is_a_link_or_a_device_is_refused(read: Callable[..., Outcome]) -> None:
    """`tar` stores the second of two hard-linked files as a link: that clip must not vanish."""
    members: list[Member] = [
        *sample("k"),
        special("soft.mp4", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.mp4", tarfile.LNKTYPE, "k.mp4"),
        special("pipe.mp4", tarfile.FIFOTYPE),
        special("device.mp4", tarfile.CHRTYPE),
        special("words.txt", tarfile.SYMTYPE, "k.txt"),
        ("words.mp4", b"video"),
        *sample("second"),
        special("second.webm", tarfile.SYMTYPE, "second.mp4"),
    ]
    outcome = read(members)
    assert list(outcome.clips) == ["k", "second"], "of two renditions the first counts"
    kinds = ("a symbolic link to '/etc/passwd'", "a hard link to 'k.mp4'", "a FIFO", "a character device")
    names = ("soft", "hard", "pipe", "device")
    assert [(r.key, r.error_class, r.message) for r in outcome.rejections[:4]] == [
        (name, "no_video", f"'{name}.mp4': expected a file, got {kind}") for name, kind in zip(names, kinds)
    ]
    assert outcome.classes["words"] == "bad_caption"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_formats_and_long_names(read: Callable[..., Outcome], format: int) -> None:
    key = f"{'folder/' * 12}{'k' * 80}"
    outcome = read(tar_bytes([*sample(key), *sample("z" * 90)], format=format))
    assert list(outcome.clips) == [key, "z" * 90]


def test_the_video_extension_is_configurable(read: Callable[..., Outcome]) -> None:
    members = [("k.mp4", b"one"), ("k.webm", b"two")]
    assert read(members).clips["k"].video == b"one", "of two renditions the first counts"
    assert read(members, video_extensions=("webm",)).clips["k"].video == b"two"


# Damage

SMALL = [
    *sample("a", video=b"1" * 700, text="one"),
    *sample("b", video=b"2" * 100, text="two"),
    *sample("c", text="three"),
]
SMALL_TAR = tar_bytes(SMALL)
SMALL_END = len(SMALL_TAR.rstrip(b"\0")) // 512 * 512 + 512
"""Where the last member's block ends."""


@pytest.fixture
def whole(read: Callable[..., Outcome]) -> Outcome:
    outcome = read(SMALL_TAR)
    assert len(outcome.clips) == 3
    assert outcome.rejections == []
    return outcome


def assert_whole_or_rejected(damaged: Outcome, whole: Outcome) -> None:
    assert all(clip == whole.clips.get(key) for key, clip in damaged.clips.items())


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


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE, *, base256: bool = False) -> bytes:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = 0 if base256 else size
    raw = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    if base256:
        raw[124:136] = size.to_bytes(12, "big", signed=True)
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def pax(fields: dict[str, str]) -> bytes:
    info = tarfile.TarInfo("k.mp4")
    info.pax_headers = fields
    return info.tobuf(tarfile.PAX_FORMAT)


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


# Resources


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_no_descriptor_is_left_open(read: Callable[..., Outcome], tmp_path: Path) -> None:
    before = open_descriptors()
    for cut in (len(SMALL_TAR), SMALL_END - 512, 2600, 600):
        read(SMALL_TAR[:cut])
    read([*itertools.chain.from_iterable(sample("same", video=b"x" * 3000) for _ in range(5))], max_clip_bytes=2000)
    assert open_descriptors() == before
    path = tmp_path / "00000.tar"
    path.write_bytes(SMALL_TAR)
    samples = read_shard(
        VideoShard(id="0", kind="webdataset", url=str(path)),
        WebDatasetSource(urls=str(path)),
        max_clip_bytes=1 << 20,
        digest=SourceDigest(),
    )
    first = next(iter(samples))
    assert isinstance(first, Clip)
    first.video.close()
    samples.close()  # type: ignore[attr-defined] - a generator, left in the middle
    del samples
    assert open_descriptors() == before


def test_a_large_member_streams(tmp_path: Path) -> None:
    """200 MB, sparse on disk: it must not pass through Python's heap whole."""
    size = 200_000_000
    path = tmp_path / "00000.tar"
    with path.open("wb") as file:
        file.write(header("k.mp4", size))
        file.seek(-(-size // 512) * 512, os.SEEK_CUR)
        file.write(bytes(1024))
    tracemalloc.start()
    digest = SourceDigest()
    shard = VideoShard(id="0", kind="webdataset", url=str(path))
    sizes = []
    for clip in read_shard(shard, WebDatasetSource(urls=str(path)), max_clip_bytes=1 << 30, digest=digest):
        assert isinstance(clip, Clip)
        with clip.video as blob:
            sizes.append(blob.size)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sizes == [size]
    assert peak < 16 << 20


def test_headers_are_not_kept(read: Callable[..., Outcome]) -> None:
    """tarfile keeps each header it has seen: a kilobyte a member. And a short text costs no large buffer."""
    content = tar_bytes([*((f"ignored-{number}", b"") for number in range(6000)), *sample("k")])
    tracemalloc.start()
    assert list(read(content).clips) == ["k"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20


def test_a_tar_that_changed_since_planning_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "00000.tar"
    path.write_bytes(SMALL_TAR)
    (shard,) = plan_source(WebDatasetSource(urls=str(path))).shards
    assert len(read_url(str(path), planned=shard).clips) == 3
    path.write_bytes(SMALL_TAR + bytes(512))
    with pytest.raises(SourceChanged, match=rf"had {len(SMALL_TAR)} bytes when the run was planned"):
        read_url(str(path), planned=shard)


# Planning


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (2, 0, 1, 10):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"x" * number)
        (tmp_path / f"{number:05d}.parquet").touch()
    (tmp_path / "00007.tar").mkdir()
    return tmp_path


PATTERNS = {
    "": ["00000", "00001", "00002", "00010"],
    "/": ["00000", "00001", "00002", "00010"],
    "/*.tar": ["00000", "00001", "00002", "00010"],
    "/0000[12].*": ["00001", "00002"],
    "/{00000..00002}.tar": ["00000", "00001", "00002"],
    "/{00010,00001}.tar": ["00001", "00010"],
    "/0000{1,2}.t{a,a}r": ["00001", "00002"],
    "/00002.tar": ["00002"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_planning(folder: Path, pattern: str) -> None:
    shards = plan_source(WebDatasetSource(urls=f"{folder}{pattern}")).shards
    assert [shard.id for shard in shards] == PATTERNS[pattern]
    assert [(s.url, s.size) for s in shards] == [(f"{folder}/{s.id}.tar", int(s.id)) for s in shards]


def test_planning_a_list_counts_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    name = folder.name
    urls = [f"{folder}/00010.tar", str(folder), f"{folder}/*.tar", f"{name}/00001.tar", f"./{name}/../{name}"]
    shards = plan_source(WebDatasetSource(urls=tuple(urls))).shards
    assert [shard.id for shard in shards] == ["00000", "00001", "00002", "00010"]
    assert all(shard.url.startswith("/") for shard in shards), "workers have other working directories"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/absent", "absent does not exist"),
        ("/absent.tar", "absent.tar does not exist"),
        ("/{00000..00003}.tar", "00003.tar does not exist"),
        ("/*.mp4", "no .tar found"),
        ("/00000.parquet", "no .tar found .*1 other"),
        ("/00007.tar", "00007.tar does not exist"),
    ],
)
def test_planning_what_is_not_there(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        plan_source(WebDatasetSource(urls=f"{folder}{pattern}"))


def test_planning_an_unbalanced_brace(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.urls: .*\{00000"):
        plan_source(WebDatasetSource(urls=f"{folder}/{{00000..2.tar"))


def test_two_tars_of_one_stem(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more/00001.tar").touch()
    with pytest.raises(SourceError, match=r"'00001'.*00001\.tar and .*more/00001\.tar"):
        plan_source(WebDatasetSource(urls=(str(folder), f"{folder}/more")))


# From S3


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> Store:
    store = Store(f"{s3_server.url}/{request.function.__name__}", options=s3_server.options)
    for number in range(3):
        store.create(f"{number:05d}.tar", SMALL_TAR)
    return store


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00002}.tar"])
def test_planning_on_s3(bucket: Store, pattern: str) -> None:
    shards = plan_source(WebDatasetSource(urls=f"{bucket.url}{pattern}", options=bucket.options)).shards
    assert [shard.id for shard in shards] == ["00000", "00001", "00002"]
    assert {(shard.size, shard.etag) for shard in shards} == {(len(SMALL_TAR), hashlib.md5(SMALL_TAR).hexdigest())}
    assert shards[0].url == f"{bucket.url}/00000.tar"


def test_reading_from_s3_through_faults(bucket: Store, s3_server: S3Server, whole: Outcome) -> None:
    with proxy_to(s3_server) as proxy:
        spec = WebDatasetSource(urls=f"{bucket.url}/00000.tar", options=proxy.options)
        (shard,) = plan_source(spec).shards
        proxy.faults.extend([Fault(cut_after=700), Fault(cut_after=2000)])
        outcome = read_url(shard.url, planned=shard, options=proxy.options)
        assert outcome == whole
        assert len(proxy.requests("GET", "00000.tar")) == 3


def test_a_long_brace_pattern_is_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        (tmp_path / f"{number:05d}.tar").write_bytes(bytes(10240))
    pattern = f"{tmp_path}/{{00000..00099}}.tar"
    (tmp_path / "other.tar").write_bytes(bytes(10240))
    asked_for: list[str] = []

    def ask(url: str, options: dict[str, Any]) -> ObjectInfo:
        asked_for.append(url)
        return object_info(url, options)

    monkeypatch.setattr(tar_source, "object_info", ask)
    shards = plan_source(WebDatasetSource(urls=pattern)).shards
    assert [shard.id for shard in shards] == [f"{number:05d}" for number in range(100)]
    assert {shard.size for shard in shards} == {10240}
    assert asked_for == []
    (tmp_path / "00042.tar").unlink()
    with pytest.raises(SourceError, match=r"00042\.tar does not exist"):
        plan_source(WebDatasetSource(urls=pattern))
