"""What reading a source learns besides its clips."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class SourceDigest:
    """Filled while a shard is read; its receipt stores it."""

    sha256: str | None = None
    """Of the whole tar, once it was read to the end."""
