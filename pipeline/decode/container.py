"""What a file's first bytes say before a demuxer is let near it."""

from __future__ import annotations

import os

from pipeline.errors import ClipError, RejectionClass

_EBML_HEADER = bytes.fromhex("1A45DFA3")
_SEGMENT = bytes.fromhex("18538067")


def check_container(path: str) -> None:
    """ClipError for an empty file, for text, and for a Matroska file that is shorter than it says.

    A playlist named .mp4 would make a demuxer open other files; decord's has no list of what it may open. libav
    takes the end of a cut Matroska file for the end of the video.
    """
    with open(path, "rb") as file:
        head = file.read(4096)
        size = os.fstat(file.fileno()).st_size
    if not head:
        raise ClipError(RejectionClass.UNSUPPORTED_CONTAINER, "decode", "the file is empty")
    if is_text(head):
        message = f"the file is text: it starts with {head[:8]!r}"
        raise ClipError(RejectionClass.UNSUPPORTED_CONTAINER, "decode", message)
    stated = matroska_size(head)
    if stated is not None and size < stated:
        message = f"the Matroska file has {size} of {stated} bytes"
        raise ClipError(RejectionClass.CORRUPT_FRAMES, "decode", message)


def is_text(head: bytes) -> bool:
    """Every video container has a byte that is not text among its first eight, but for RIFF (AVI) files."""
    text = all(0x20 <= byte < 0x7F or byte in b"\t\n\r" for byte in head[:8])
    return text and not head.startswith(b"RIFF")


def matroska_size(head: bytes) -> int | None:
    """Bytes up to the end of a Matroska or WebM file's segment; None for other files and where it is not stated."""
    if not head.startswith(_EBML_HEADER):
        return None
    length, start = _element_size(head, len(_EBML_HEADER))
    if length is None or not head.startswith(_SEGMENT, start + length):
        return None
    segment, start = _element_size(head, start + length + len(_SEGMENT))
    return None if segment is None else start + segment


def _element_size(head: bytes, at: int) -> tuple[int | None, int]:
    """An EBML element's data size (None if all its bits are set: unknown) and where its data starts."""
    first = head[at] if at < len(head) else 0
    width = 9 - first.bit_length()
    if width > 8 or at + width > len(head):
        return None, at
    mask = (1 << 7 * width) - 1
    value = int.from_bytes(head[at : at + width], "big") & mask
    return (None if value == mask else value), at + width
