"""Tars to read in the tests of the tar source, and what reading one gives."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hypothesis import HealthCheck, settings

from pipeline.records import Rejection, VideoShard
from pipeline.sources import SourceDigest, WebDatasetSource, read_shard

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


SMALL = [
    *sample("a", video=b"1" * 700, text="one"),
    *sample("b", video=b"2" * 100, text="two"),
    *sample("c", text="three"),
]
SMALL_TAR = tar_bytes(SMALL)
SMALL_END = len(SMALL_TAR.rstrip(b"\0")) // 512 * 512 + 512
"""Where the last member's block ends."""


def assert_whole_or_rejected(damaged: Outcome, whole: Outcome) -> None:
    assert all(clip == whole.clips.get(key) for key, clip in damaged.clips.items())


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


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
