"""Local scratch space of an encode actor; what a killed one leaves is given back when the next one starts.

Each process holds a lock on its folder; whoever starts later removes the folders nobody holds.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK_SUFFIX = ".lock"


def default_root() -> Path:
    """A folder of this user's in the system's temporary folder ($TMPDIR)."""
    return Path(tempfile.gettempdir()) / f"cvvae-latents-{os.getuid()}"


class Scratch:
    """A folder of this process under `root`."""

    def __init__(self, root: Path | None = None) -> None:
        self._root = root or default_root()
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._remove_abandoned()
        self.path = self._root / uuid.uuid4().hex
        self._lock = FileLock(f"{self.path}{_LOCK_SUFFIX}")
        self._lock.acquire()
        self.path.mkdir()

    @contextmanager
    def folder(self, name: str) -> Iterator[Path]:
        """A new, empty folder, removed at the end."""
        with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=self.path) as folder:
            yield Path(folder)

    def close(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()

    def _remove_abandoned(self) -> None:
        for lock_path in self._root.glob(f"*{_LOCK_SUFFIX}"):
            try:
                with FileLock(lock_path, timeout=0):
                    shutil.rmtree(lock_path.with_suffix(""), ignore_errors=True)
                    lock_path.unlink(missing_ok=True)
            except (Timeout, PermissionError):
                continue  # its owner lives, or is another user's
