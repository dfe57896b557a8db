"""Reading WebDataset tars: every layout, every damage. A sample comes whole and equal, or as a Rejection; a damage
never passes silently."""

from __future__ import annotations

import itertools
import os
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import SourceChanged
from pipeline.records import Clip, VideoShard
from pipeline.sources import SourceDigest, WebDatasetSource, plan_source, read_shard
from tests.pipeline.sources.tar_cases import (
    SMALL_END,
    SMALL_TAR,
    Member,
    Outcome,
    ReadClip,
    header,
    read_url,
    sample,
    special,
    tar_bytes,
)


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
