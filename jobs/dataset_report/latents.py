"""The latents of the looked-at windows: histograms by channel, and their principal components as colours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BINS = 41
SPREAD = 4.0
"""A histogram reaches this many standard deviations to both sides of the mean."""
MAX_VECTORS = 50_000
DEAD_STD = 1e-6
"""A channel that varies less than this carries nothing."""


@dataclass(frozen=True, slots=True)
class ChannelHistogram:
    """Shares of a channel's values per bin; what is outside counts in the first or last."""

    channel: int
    centres: tuple[float, ...]
    shares: tuple[float, ...]


def histograms(latents_CTHW: Sequence[Tensor]) -> list[ChannelHistogram]:
    """One per channel over all values of all latents. ValueError without a latent."""
    values_CN = _vectors(latents_CTHW)
    found = []
    for channel, values in enumerate(values_CN.numpy()):
        reach = SPREAD * float(values.std()) or 1.0
        edges = np.linspace(values.mean() - reach, values.mean() + reach, BINS + 1)
        counts, _ = np.histogram(values.clip(edges[0], edges[-1]), bins=edges)
        centres = (edges[1:] + edges[:-1]) / 2
        found.append(ChannelHistogram(channel, tuple(centres.tolist()), tuple((counts / counts.sum()).tolist())))
    return found


@dataclass(frozen=True, slots=True)
class Components:
    """The directions in which latents vary most, channels scaled to unit variance first."""

    mean_C: Tensor
    scale_C: Tensor
    axes_CK: Tensor
    shares: tuple[float, ...]
    """Of the variance, by component, largest first; all of them."""
    low_K: Tensor
    high_K: Tensor

    @classmethod
    def of(cls, latents_CTHW: Sequence[Tensor]) -> Components:
        """Of all vectors over channels, or an even choice of them."""
        values_CN = _vectors(latents_CTHW)
        mean_C = values_CN.mean(dim=1)
        scale_C = values_CN.std(dim=1).clamp_min(DEAD_STD)
        unit_CN = (values_CN - mean_C[:, None]) / scale_C[:, None]
        variances, axes = torch.linalg.eigh(unit_CN @ unit_CN.T / unit_CN.shape[1])
        order = variances.argsort(descending=True)
        axes_CK = axes[:, order][:, :3]
        axes_CK = torch.where(axes_CK.sum(dim=0) < 0, -axes_CK, axes_CK)  # a sign that no library chooses
        projected_KN = axes_CK.T @ unit_CN
        shares = (variances[order].clamp_min(0) / variances.clamp_min(0).sum()).tolist()
        quantiles = torch.tensor((0.01, 0.99), dtype=projected_KN.dtype)
        low_K, high_K = projected_KN.quantile(quantiles, dim=1)
        return cls(mean_C, scale_C, axes_CK, tuple(shares), low_K, high_K)

    def pictures(self, latent_CTHW: Tensor, *, enlarge: int) -> np.ndarray:
        """uint8 (t, h * enlarge, w * enlarge, 3): the first three components as red, green and blue."""
        unit_CTHW = (latent_CTHW.double() - self.mean_C.view(-1, 1, 1, 1)) / self.scale_C.view(-1, 1, 1, 1)
        projected_KTHW = torch.einsum("ck,cthw->kthw", self.axes_CK, unit_CTHW)
        low, high = self.low_K.view(-1, 1, 1, 1), self.high_K.view(-1, 1, 1, 1)
        shown = ((projected_KTHW - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
        colours = torch.full((3, *shown.shape[1:]), 0.5, dtype=shown.dtype)
        colours[: shown.shape[0]] = shown  # a VAE of fewer than three channels leaves the others grey
        pixels_THWC = (colours * 255).round().to(torch.uint8).permute(1, 2, 3, 0).numpy()
        return pixels_THWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)


def _vectors(latents_CTHW: Sequence[Tensor]) -> Tensor:
    """float64 (C, N), at most about MAX_VECTORS of them, evenly chosen."""
    if not latents_CTHW:
        raise ValueError("expected at least one latent, got none")
    total = sum(latent[0].numel() for latent in latents_CTHW)
    step = max(1, total // MAX_VECTORS)
    return torch.cat([latent.double().flatten(1)[:, ::step] for latent in latents_CTHW], dim=1)
