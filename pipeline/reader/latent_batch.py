"""A batch as a trainer gets it, and what is done to stored numbers on the way.

What is random here (noise, dropped captions, the start of a sub-window) is a function of (seed, epoch, shard, key):
fresh in every epoch, the same in every run, whoever computes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cvvae import VAESpec
from pipeline.logvar_code import logvar_from_int8
from pipeline.reader.batch_memory import BatchMemory
from pipeline.reader.plan import seed_of
from pipeline.reader.row_bytes import RowBytes

_SERIAL = (1 << 15) - 1
"""Numbers that torch converts without starting threads: its grain size is 2 ** 15."""
_GROUP = 1 << 18
"""Numbers of a group of rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubWindow:
    """Cut longer windows to `frames` video frames. ValueError where that is no length of the VAE's.

    From the first frame it is allowed where the VAE gives the same numbers for those frames alone: at every length
    for causal VAEs, where a temporal tile ends for others. Anything else must be asked for with `approximate`.
    """

    frames: int
    start: Literal["first", "random"] = "first"
    """"random": any latent frame. Its first latent then stands for time_stride frames, and has seen earlier ones."""
    approximate: bool = False

    def latent_frames(self, spec: VAESpec, time: int, height: int, width: int) -> int:
        """Latent frames that a (T, H, W) window is cut to. ValueError if its numbers would not be exact."""
        if time <= self.frames:
            return spec.num_latent_frames(time)
        cut = spec.num_latent_frames(self.frames)
        if not self.approximate:
            where = f"sub_window of {self.frames} frames in windows of {time}"
            if self.start != "first":
                raise ValueError(
                    f"{where}: expected start='first', got {self.start!r}: not exact; see approximate=True"
                )
            if not spec.has_exact_prefix(time, self.frames, height, width):
                exact = [
                    number
                    for number in range(1, time + 1)
                    if spec.is_valid_num_frames(number) and spec.has_exact_prefix(time, number, height, width)
                ]
                raise ValueError(
                    f"{where}: not what {spec.name} gives for those frames alone; exact are {exact}; "
                    "see approximate=True"
                )
        return cut


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What is done with stored latents. ValueError for what makes no sense."""

    latents: Literal["normalized", "raw"] = "normalized"
    sample: Literal["mean", "sample"] = "mean"
    dtype: torch.dtype = torch.float32
    columns: tuple[str, ...] = ()
    caption_dropout: float = 0.0
    sub_window: SubWindow | None = None

    def __post_init__(self) -> None:
        for name, choices in (("latents", ("normalized", "raw")), ("sample", ("mean", "sample"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {getattr(self, name)!r}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: expected 0 to 1, got {self.caption_dropout}")
        if not self.dtype.is_floating_point:
            raise ValueError(f"dtype: expected a floating point dtype, got {self.dtype}")

    @property
    def draws(self) -> bool:
        """Whether anything of a batch is random."""
        random_start = self.sub_window is not None and self.sub_window.start == "random"
        return self.sample == "sample" or self.caption_dropout > 0 or random_start


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentBatch:
    """A rank's rows of one global batch; all of one shape."""

    latents_BCTHW: Tensor
    """Normalized, (z - shift) * scale, unless raw was asked for."""
    captions: list[str]
    """Empty where dropped."""
    keys: list[str]
    shard_ids: list[str]
    """A key is unique within its shard."""
    bucket: str
    """TTTTTxHHHHHxWWWWW of the stored windows, in frames and pixels."""
    columns: dict[str, list[Any]]
    """The index's fields that were asked for. Frame times and indices are those of the frames a sub-window has."""
    is_padding_B: Tensor
    """bool: rows that only fill up a batch and that a loss should leave out."""
    num_unreadable: int
    """Rows of it that could not be read and were replaced, with on_corrupt="skip"."""
    epoch: int
    number: int
    """Of this batch in the global sequence, from 0."""

    @property
    def consumed(self) -> int:
        """Global batches consumed once this one is: what to keep in a checkpoint."""
        return self.number + 1

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> LatentBatch:
        """With its tensors on another device."""
        return replace(
            self,
            latents_BCTHW=self.latents_BCTHW.to(device, non_blocking=non_blocking),
            is_padding_B=self.is_padding_B.to(device, non_blocking=non_blocking),
        )

    def pin_memory(self) -> LatentBatch:
        """What a DataLoader with pin_memory calls."""
        return replace(
            self, latents_BCTHW=self.latents_BCTHW.pin_memory(), is_padding_B=self.is_padding_B.pin_memory()
        )


def fraction_of(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    return (seed_of(*parts) >> 75) / (1 << 53)


def noise(shape: tuple[int, ...], *parts: object) -> np.ndarray:
    """Standard normal float32 numbers, a function of the parts and of numpy's release."""
    generator = np.random.Generator(np.random.Philox(key=seed_of("noise", *parts)))
    return generator.standard_normal(shape, dtype=np.float32)


class LatentMaker:
    """Stored numbers to what a trainer takes, computed in float32: sampled first, then shifted and scaled.

    For z' = (z - shift) * scale that is a sample of the normalized posterior, whose logvar is logvar + 2 log|scale|.
    Works through a batch in groups of rows that stay in the processor's cache from one step to the next, and on the
    caller's thread alone: torch's others belong to the training step. numpy has none; torch, which is quicker at
    converting, stays on one if it is given little at a time.
    """

    def __init__(
        self, stored: torch.dtype, logvar: torch.dtype, factors: tuple[np.ndarray, np.ndarray], reading: Reading
    ) -> None:
        """`stored` and `logvar` are the dtypes on disk, int8 for coded log variances.

        `factors` are shift and scale, float32 (C or 1, 1, 1, 1).
        """
        self._stored, self._logvar, self._reading = stored, logvar, reading
        shift, scale = (factor.reshape(-1, 1) for factor in factors)
        normalized = reading.latents == "normalized"
        self._shift = shift if normalized and bool((shift != 0).any()) else None
        self._scale = scale if normalized and bool((scale != 1).any()) else None
        self._memory = BatchMemory()
        plain = reading.sample == "mean" and self._shift is None and self._scale is None
        self._as_stored = plain and reading.dtype == stored

    def batch(
        self,
        shape: tuple[int, ...],
        rows: Sequence[tuple[RowBytes, RowBytes | None, int]],
        seeds: Sequence[tuple[object, ...]],
    ) -> Tensor:
        """(B, *shape) from mean, log variance and number of each row; `seeds` decide the noise of each."""
        latents_BN = self._memory.empty((len(rows), math.prod(shape)), self._reading.dtype)
        if self._as_stored:
            for out, (mean, _, row) in zip(_row_memory(latents_BN), rows, strict=True):
                mean.copy(row, out)
            return latents_BN.view(len(rows), *shape)
        group = max(1, _GROUP // latents_BN.shape[1])
        stored_BN = torch.empty(min(group, len(rows)), latents_BN.shape[1], dtype=self._stored)
        for first in range(0, len(rows), group):
            part = slice(first, first + group)
            self._group(shape, rows[part], seeds[part], stored_BN, latents_BN[part])
        return latents_BN.view(len(rows), *shape)

    def _group(
        self,
        shape: tuple[int, ...],
        rows: Sequence[tuple[RowBytes, RowBytes | None, int]],
        seeds: Sequence[tuple[object, ...]],
        stored_BN: Tensor,
        latents_BN: Tensor,
    ) -> None:
        """Some rows of a batch; `stored_BN` is for what is read."""
        stored_BN, memory = stored_BN[: len(rows)], _row_memory(stored_BN)
        for out, (mean, _, row) in zip(memory, rows, strict=False):
            mean.copy(row, out)
        is_float32 = latents_BN.dtype == torch.float32
        numbers_BN = latents_BN if is_float32 else torch.empty(latents_BN.shape)
        _convert(numbers_BN, stored_BN)
        if self._reading.sample == "sample":
            logvar_BN = torch.empty(stored_BN.shape, dtype=self._logvar)
            for out, (_, logvar, row) in zip(_row_memory(logvar_BN), rows, strict=True):
                assert logvar is not None, "asked of the dataset when it was opened"
                logvar.copy(row, out)
            _add_noise(numbers_BN, logvar_BN, shape, seeds)
        numbers_BCN = numbers_BN.view(len(rows), shape[0], -1).numpy()
        if self._shift is not None:
            numbers_BCN -= self._shift
        if self._scale is not None:
            numbers_BCN *= self._scale
        if not is_float32:
            _convert(latents_BN, numbers_BN)


def _add_noise(
    numbers_BN: Tensor, logvar_BN: Tensor, shape: tuple[int, ...], seeds: Sequence[tuple[object, ...]]
) -> None:
    values_BN = torch.empty(logvar_BN.shape)
    _convert(values_BN, logvar_BN)
    for number_N, logvar_N, seed in zip(numbers_BN.numpy(), values_BN.numpy(), seeds, strict=True):
        number_N += np.exp(logvar_N * np.float32(0.5)) * noise(shape, *seed).reshape(-1)


def _row_memory(tensor_BN: Tensor) -> list[memoryview]:
    """The bytes of each row, to write into."""
    memory = memoryview(tensor_BN.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type] - an array is a buffer
    size = len(memory) // len(tensor_BN)
    return [memory[start : start + size] for start in range(0, len(memory), size)]


def _convert(into: Tensor, source: Tensor) -> None:
    """Copy numbers, log variances decoded, in parts so small that torch starts no thread for one."""
    for part, numbers in zip(into.view(-1).split(_SERIAL), source.view(-1).split(_SERIAL), strict=True):
        part.copy_(logvar_from_int8(numbers) if numbers.dtype == torch.int8 else numbers)
