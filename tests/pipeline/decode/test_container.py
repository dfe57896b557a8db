from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.decode.container import check_container, is_text, matroska_size
from pipeline.errors import ClipError
from tests.awkward_clips import ClipMaker


@pytest.mark.parametrize("suffix", ["mkv", "webm"])
def test_a_whole_matroska_file_states_its_size(maker: ClipMaker, suffix: str) -> None:
    codec = ("-c:v", "libvpx-vp9") if suffix == "webm" else ("-c:v", "libx264")
    path = maker.coded(3, f"sized.{suffix}", *codec)
    data = path.read_bytes()
    assert matroska_size(data[:4096]) == len(data)
    check_container(str(path))
    cut = maker.damaged(path, f"one_byte_less.{suffix}", data[:-1])
    with pytest.raises(ClipError, match=f"{len(data) - 1} of {len(data)} bytes"):
        check_container(str(cut))


def test_a_live_matroska_file_states_none(maker: ClipMaker) -> None:
    path = maker.coded(3, "live.mkv", "-c:v", "libx264", "-live", "1")
    assert matroska_size(path.read_bytes()) is None
    check_container(str(path))


@pytest.mark.parametrize(
    "head", [b"", b"\x1a\x45\xdf\xa3", b"\x1a\x45\xdf\xa3\x00", b"\x00\x00\x00\x20ftyp", b"\x1a\x45\xdf\xa3\x81"]
)
def test_anything_else_has_no_matroska_size(head: bytes) -> None:
    assert matroska_size(head) is None


def test_text_and_containers(real_clips: dict[str, Path], maker: ClipMaker) -> None:
    assert is_text(b"#EXTM3U\n#EXT")
    assert is_text(b"ffconcat version 1.0")
    assert is_text(b"v=0\r\no=- 0")
    assert not is_text(b"RIFF....AVI LIST")
    assert not is_text(b"OggS\x00\x02")
    assert not is_text(b"FLV\x01\x05")
    assert not any(is_text(path.read_bytes()[:64]) for path in real_clips.values())
