"""Memory that two processes share without a name, so that nothing is left behind whoever is killed.

A `Blob` is an anonymous file (memfd on Linux, an unlinked temporary file elsewhere). Its descriptor crosses to
another process over a Unix socket; the kernel frees the memory when the last descriptor and mapping are gone.
POSIX shared memory would have to be unlinked by somebody who survives, and is capped by /dev/shm (64 MB in a
default container); this is neither.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from types import TracebackType

_AT_ONCE = getattr(mmap, "MAP_POPULATE", 0)
"""Pages are mapped in one go where the system can: one fault per page costs a third more for a window."""


class Blob:
    """An anonymous, file-backed run of bytes. Closing it twice is allowed; collected blobs close themselves."""

    __slots__ = ("_fd", "size")

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size

    @classmethod
    def create(cls, name: str = "blob") -> Blob:
        """An empty blob, to be filled with `write`."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create(name, os.MFD_CLOEXEC), 0)
        fd, path = tempfile.mkstemp(prefix=name)
        os.unlink(path)  # noqa: PTH108 - a descriptor's file, not a user's path
        return cls(fd, 0)

    @classmethod
    def from_bytes(cls, data: bytes | memoryview) -> Blob:
        blob = cls.create()
        blob.write(data)
        return blob

    @property
    def fd(self) -> int:
        if self._fd < 0:
            raise ValueError("blob is closed")
        return self._fd

    @property
    def path(self) -> str:
        """A path that opens the blob from its start, with a position of its own, in this process."""
        return f"/dev/fd/{self.fd}"

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        view = memoryview(data).cast("B")
        while view:
            written = os.write(self.fd, view)
            self.size += written
            view = view[written:]

    def map(self, *, writable: bool = False) -> mmap.mmap:
        """Map all of it; the mapping outlives the blob."""
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        return mmap.mmap(self.fd, self.size, flags=mmap.MAP_SHARED | _AT_ONCE, prot=protection)

    def resize(self, size: int) -> None:
        os.ftruncate(self.fd, size)
        self.size = size

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Blob:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
