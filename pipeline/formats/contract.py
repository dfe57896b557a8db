"""What an output format is, and what every one of them demands of the latents it stores."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import torch
from torch import Tensor

from pipeline.errors import DatasetError
from pipeline.formats.header import ShardHeader
from pipeline.formats.tensors import dtype_name
from pipeline.records import Latent, LatentRow


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadPlace:
    """Where a window's numbers are in its shard: byte spans of whole files (WebDataset), or a row (Parquet)."""

    latent_offset: int | None = None
    latent_length: int | None = None
    logvar_offset: int | None = None
    logvar_length: int | None = None
    row_group: int | None = None
    row_in_group: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexRow(PayloadPlace):
    """One row of the index: a window, its number in the shard, and where its numbers are."""

    row: LatentRow
    row_number: int


class ShardFormat(Protocol):
    """A way to store the latents of a shard in one file. All errors of the two readers are DatasetError."""

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str:
        """Of the shard's file name, with the dot."""
        ...

    @property
    def padded_to(self) -> int:
        """A file's bytes are a multiple of this; what is missing is zeros at its end."""
        ...

    def write(self, path: Path, latents: Iterable[Latent], header: ShardHeader) -> list[PayloadPlace]:
        """Write a shard whose bytes are a function of latents and header; places in the latents' order.

        Takes one latent at a time. ValueError if they are not in stored order or cannot be stored (`Demands`).
        """
        ...

    def read_header(self, file: BinaryIO) -> ShardHeader: ...

    def read(self, file: BinaryIO) -> Iterator[Latent]:
        """All latents in stored order, one at a time, each checked against its row."""
        ...

    def fetch(self, file: BinaryIO, rows: Sequence[IndexRow]) -> Iterator[Latent]:
        """The latents of some index rows, in the given order, without reading the others."""
        ...


class Demands:
    """Checks latents one by one, as they are written or read. `problem` says what is wrong, or gives None."""

    def __init__(self, header: ShardHeader) -> None:
        self._header = header
        self._previous: tuple[LatentRow, tuple[object, ...]] | None = None

    def problem(self, latent: Latent) -> str | None:
        row, before = latent.row, self._previous
        kind = row.latent_dtype, row.has_logvar, latent.logvar_CTHW is not None and latent.logvar_CTHW.dtype
        self._previous = row, kind
        found = key_problem(row.key) or tensor_problem(latent)
        if found is not None:
            return f"{row.key!r}: {found}"
        if row.shard_id != self._header.shard_id:
            return f"{row.key!r}: belongs to shard {row.shard_id!r}, the header says {self._header.shard_id!r}"
        if before is None:
            return None
        previous, kind_before = before
        if kind != kind_before:
            return f"{row.key!r}: dtype or logvar differs from {previous.key!r}: one shard stores one kind"
        if row.sort_key <= previous.sort_key:
            return f"expected strictly increasing (bucket, key), got {row.sort_key} after {previous.sort_key}"
        return None


def accepted(latents: Iterable[Latent], header: ShardHeader) -> Iterator[Latent]:
    """The latents as they come; ValueError at the first that may not be stored."""
    demands = Demands(header)
    for latent in latents:
        problem = demands.problem(latent)
        if problem is not None:
            raise ValueError(problem)
        yield latent


def verified(latents: Iterable[Latent], header: ShardHeader, where: str) -> Iterator[Latent]:
    """The latents as they come; DatasetError at the first that may not have been stored."""
    demands = Demands(header)
    for latent in latents:
        problem = demands.problem(latent)
        if problem is not None:
            raise DatasetError(f"{where}: {problem}")
        yield latent


def tensor_problem(latent: Latent) -> str | None:
    """Do the numbers have the shape and dtype that their row says?"""
    row = latent.row
    if (latent.logvar_CTHW is not None) != row.has_logvar:
        return f"has_logvar is {row.has_logvar}, but logvar is {'there' if not row.has_logvar else 'missing'}"
    tensors: dict[str, Tensor | None] = {"latent": latent.mean_CTHW, "logvar": latent.logvar_CTHW}
    is_coded = latent.logvar_CTHW is not None and latent.logvar_CTHW.dtype == torch.int8
    dtypes = {"latent": row.latent_dtype, "logvar": "int8" if is_coded else row.latent_dtype}
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != row.latent_shape or dtype_name(tensor.dtype) != dtypes[name]:
            return (
                f"{name}: expected {dtypes[name]} {list(row.latent_shape)}, "
                f"got {dtype_name(tensor.dtype)} {list(tensor.shape)}"
            )
    return None


def key_problem(key: str) -> str | None:
    """Would every tar reader take this key for one sample's name, and nothing else?"""
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "key has an empty, '.' or '..' part"
    if "." in parts[-1]:
        return "key has a dot in its last part, where readers would cut it"
    if len(parts) > 1 and re.fullmatch("__.*__", parts[0], re.DOTALL):
        return "key starts with a folder __NAME__, which the webdataset library skips"
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in key):
        return "key has a control character, or a lone surrogate and so no UTF-8"
    return None
