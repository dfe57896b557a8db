"""Latents of one shard on local disk until all are there to be put in order.

Rows of a shard are stored by (bucket, key), which is known only when its last clip is encoded. Latents are about a
hundredth of their pixels, but a shard may still hold gigabytes of them; so their bytes wait in one local file and
only their rows stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from pipeline.records import Latent, LatentRow


@dataclass(frozen=True, slots=True)
class _Place:
    row: LatentRow
    offset: int
    dtype: torch.dtype
    logvar_dtype: torch.dtype | None


class LatentSpool:
    """Append latents, read them back in stored order."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w+b")
        self._places: list[_Place] = []

    def __enter__(self) -> LatentSpool:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._file.close()

    def append(self, latent: Latent) -> None:
        """Write a latent's numbers; its tensors must be on the CPU."""
        offset = self._file.seek(0, 2)
        logvar_dtype = None if latent.logvar_CTHW is None else latent.logvar_CTHW.dtype
        self._places.append(_Place(latent.row, offset, latent.mean_CTHW.dtype, logvar_dtype))
        for tensor in (latent.mean_CTHW, latent.logvar_CTHW):
            if tensor is not None:
                self._file.write(tensor.contiguous().view(torch.uint8).numpy().data)

    def ordered(self, keep: Callable[[LatentRow], bool]) -> Iterator[Latent]:
        """The latents whose row is kept, one at a time, sorted by (bucket, key)."""
        for place in sorted((p for p in self._places if keep(p.row)), key=lambda p: p.row.sort_key):
            self._file.seek(place.offset)
            mean = self._read(place, place.dtype)
            logvar = None if place.logvar_dtype is None else self._read(place, place.logvar_dtype)
            yield Latent(row=place.row, mean_CTHW=mean, logvar_CTHW=logvar)

    def _read(self, place: _Place, dtype: torch.dtype) -> Tensor:
        shape = place.row.latent_shape
        size = torch.Size(shape).numel() * dtype.itemsize
        data = bytearray(self._file.read(size))
        assert len(data) == size, "the spool is ours alone"
        return torch.frombuffer(data, dtype=dtype).reshape(shape)
