"""Small clips in many containers, a pool of real decode children, and a dataset encoded without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.decode.pool import DecodePool
from pipeline.policies import DecodePolicy
from pipeline.scratch import Scratch
from tests.awkward_clips import ClipMaker

_H264 = ("-c:v", "libx264", "-crf", "30", "-pix_fmt", "yuv420p")
CONTAINERS: dict[str, tuple[str, ...]] = {
    "plain.mp4": _H264,
    "fast.mp4": (*_H264, "-bf", "2", "-movflags", "faststart"),
    "fragments.mp4": (*_H264, "-g", "8", "-movflags", "frag_keyframe+empty_moov"),
    "hevc.mov": ("-c:v", "libx265", "-crf", "30", "-pix_fmt", "yuv420p", "-x265-params", "log-level=error"),
    "plain.mkv": _H264,
    "vp9.webm": ("-c:v", "libvpx-vp9", "-crf", "40", "-b:v", "0", "-pix_fmt", "yuv420p"),
    "av1.mp4": ("-c:v", "libsvtav1", "-preset", "12", "-crf", "45", "-pix_fmt", "yuv420p"),
    "mpeg4.avi": ("-c:v", "mpeg4", "-q:v", "5"),
    "backwards.avi": (*_H264, "-bf", "2"),  # PyAV refuses it midway, decord reads it
    "mjpeg.avi": ("-c:v", "mjpeg", "-q:v", "9"),
    "stream.ts": ("-c:v", "mpeg2video", "-q:v", "5"),
    "flash.flv": ("-c:v", "flv1", "-q:v", "5"),
    "theora.ogv": ("-c:v", "libtheora", "-q:v", "5"),
    "program.mpg": ("-c:v", "mpeg1video", "-q:v", "5"),
    "media.wmv": ("-c:v", "wmv2", "-q:v", "5"),
}
FRAMES = 24
POLICY = DecodePolicy(cpu_seconds=10, memory_mb=1024)


@pytest.fixture(scope="session")
def small_clips(ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A second of video, 160x96, in each container: a few kilobytes that decode in milliseconds."""
    maker = ClipMaker(ffmpeg, tmp_path_factory.mktemp("small"))
    return {name: maker.coded(FRAMES, name, *options).read_bytes() for name, options in CONTAINERS.items()}


@pytest.fixture(scope="session")
def pool() -> Iterator[DecodePool]:
    with DecodePool(POLICY, 2) as shared:
        yield shared


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "scratch")
    yield scratch
    scratch.close()
