"""What a foreign format is. A bucket has a folder of its own in all of them: their readers stack what they read, so
what they are given must be of one shape."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from pipeline.documents import Document, RunIdentity
from pipeline.records import Latent


class ExportedFile(Document):
    """A file of an export, under its target."""

    path: str
    size: int
    sha256: str
    rows: int
    entry: dict[str, Any]
    """What the format's own index says of it; empty where the format has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenFile:
    """A file that a format wrote on local disk, before it has a place."""

    path: Path
    rows: int
    entry: dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadBack:
    """A row as a reader of the format gets it."""

    key: str
    caption: str
    mean_CTHW: Tensor
    logvar_CTHW: Tensor | None = None


class ExportFormat(Protocol):
    """One foreign format. Bytes are a function of the latents (and of pyarrow's release)."""

    @property
    def name(self) -> str: ...

    def check(self, identity: RunIdentity, *, with_logvar: bool) -> None:
        """ConfigError if a dataset of that identity has something that the format has no place for."""
        ...

    def write(self, folder: Path, stem: str, latents: Iterable[Latent]) -> list[WrittenFile]:
        """Latents of one bucket, in order, as files in `folder` whose names begin with `stem`."""
        ...

    def read(self, path: Path) -> Iterator[ReadBack]:
        """The rows of one such file. DatasetError if it is not whole."""
        ...

    def index(self, files: Sequence[ExportedFile]) -> dict[str, bytes]:
        """Objects, by name, that a bucket's folder has beside its files once all of them are there."""
        ...
