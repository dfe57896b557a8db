"""A forward-only stream that tarfile can read as if it could seek, and that hashes what passes.

tarfile stops silently at a damaged header, so the caller must know exactly where it stopped and look at what
follows. That needs positions; `tarfile.open(mode="r|")` hides them behind its own buffer. Here tarfile runs in
plain "r:" mode on an object that seeks forward by reading, and backward within the last few bytes.
"""

from __future__ import annotations

import hashlib
import io
import tarfile
from typing import Protocol

_KEPT = 4096
_CHUNK = 1 << 20
MAX_SINGLE_READ = 64 << 20
"""A header that claims a larger extension block than this is hostile or damaged."""


class ReadsBytes(Protocol):
    def read(self, size: int = -1, /) -> bytes | None: ...


class ForwardReader(io.RawIOBase):
    """Sequential reads of a stream with `tell`, forward `seek`, and a sha256 of all bytes passed."""

    def __init__(self, stream: ReadsBytes) -> None:
        self._stream = stream
        self._position = 0
        self._replay = 0
        """How many of the kept bytes lie after the logical position."""
        self._kept = b""
        self._digest = hashlib.sha256()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("only absolute seeks")
        while self._position < offset:
            if not self.read(min(_CHUNK, offset - self._position)):
                break
        back = self._position - offset
        if back > 0:
            if self._replay + back > len(self._kept):
                raise io.UnsupportedOperation(f"cannot seek back {back} bytes in a stream")
            self._replay += back
            self._position = offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        if size < 0 or size > MAX_SINGLE_READ:
            raise tarfile.ReadError(
                f"refusing to read {size} bytes at once at offset {self._position}: damaged header?"
            )
        parts: list[bytes] = []
        wanted = size
        if self._replay and wanted:
            start = len(self._kept) - self._replay
            part = self._kept[start : start + wanted]
            self._replay -= len(part)
            wanted -= len(part)
            parts.append(part)
        while wanted:
            part = self._stream.read(wanted)
            if not part:
                break
            self._digest.update(part)
            self._kept = part[-_KEPT:] if len(part) >= _KEPT else (self._kept + part)[-_KEPT:]
            wanted -= len(part)
            parts.append(part)
        data = b"".join(parts)
        self._position += len(data)
        return data

    def drain(self) -> tuple[int, bool]:
        """Read to the end: the number of bytes from the current position on, and whether all were zero."""
        start, only_zeros = self._position, True
        while chunk := self.read(_CHUNK):
            only_zeros = only_zeros and not chunk.strip(b"\0")
        return self._position - start, only_zeros

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()
