"""A batch as a trainer gets it, and what is done to stored numbers on the way.

What is random here (noise, dropped captions, the start of a sub-window) is a function of (seed, epoch, shard, key):
fresh in every epoch, the same in every run, whoever computes it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from cvvae import VAESpec
from pipeline.reader.plan import seed_of


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


def as_float32(bytes_BN: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Stored numbers of some rows, uint8 (B, bytes of a row), as float32 (B, *shape): exact."""
    if dtype == torch.bfloat16:  # the upper half of a float32
        numbers = (bytes_BN.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    else:
        numbers = bytes_BN.view(np.float16 if dtype == torch.float16 else np.float32).astype(np.float32, copy=False)
    return numbers.reshape(len(bytes_BN), *shape)


def finished_latents(
    mean_BCTHW: np.ndarray,
    logvar_BCTHW: np.ndarray | None,
    noise_BCTHW: np.ndarray | None,
    factors: tuple[np.ndarray, np.ndarray],
    reading: Reading,
) -> Tensor:
    """Stored numbers to what a trainer takes, computed in float32: sampled first, then shifted and scaled.

    For z' = (z - shift) * scale that is a sample of the normalized posterior, whose logvar is logvar + 2 log|scale|.
    Takes over `mean_BCTHW`. numpy, because it stays on the caller's thread: torch's threads would take the cores of
    the training step.
    """
    latents = mean_BCTHW
    if logvar_BCTHW is not None and noise_BCTHW is not None:
        latents += np.exp(0.5 * logvar_BCTHW) * noise_BCTHW
    if reading.latents == "normalized":
        shift, scale = factors
        latents -= shift
        latents *= scale
    return torch.from_numpy(latents).to(reading.dtype)
