"""Per-channel statistics of latents that merge exactly in a fixed order.

Mean and sum of squared deviations are updated with the parallel formula of Chan, Golub and LeVeque (1983) in
float64. Merging is not associative in floating point: callers merge in shard order, so that the manifest's bytes
do not depend on which shard finished first.
"""

from __future__ import annotations

import math

import torch
from pydantic import BaseModel, ConfigDict


class ChannelStatistics(BaseModel):
    """Count, mean, sum of squared deviations, minimum and maximum of every channel."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    count: int = 0
    """Values per channel."""
    mean: tuple[float, ...] = ()
    m2: tuple[float, ...] = ()
    """Sum over values of (value - mean)^2."""
    minimum: tuple[float, ...] = ()
    maximum: tuple[float, ...] = ()

    @classmethod
    def of(cls, latent_CTHW: torch.Tensor) -> ChannelStatistics:
        """Statistics of one latent (C, T, H, W), any float dtype."""
        values = latent_CTHW.detach().to("cpu", torch.float64).flatten(1)
        mean = values.mean(dim=1)
        m2 = (values - mean[:, None]).square().sum(dim=1)
        return cls(
            count=values.shape[1],
            mean=tuple(mean.tolist()),
            m2=tuple(m2.tolist()),
            minimum=tuple(values.amin(dim=1).tolist()),
            maximum=tuple(values.amax(dim=1).tolist()),
        )

    def merge(self, other: ChannelStatistics) -> ChannelStatistics:
        """Statistics of both together; ValueError if the channel counts differ."""
        if other.count == 0:
            return self
        if self.count == 0:
            return other
        if len(self.mean) != len(other.mean):
            raise ValueError(f"cannot merge statistics of {len(self.mean)} and {len(other.mean)} channels")
        count = self.count + other.count
        share = other.count / count
        deltas = [b - a for a, b in zip(self.mean, other.mean, strict=True)]
        return ChannelStatistics(
            count=count,
            mean=tuple(a + d * share for a, d in zip(self.mean, deltas, strict=True)),
            m2=tuple(a + b + d * d * self.count * share for a, b, d in zip(self.m2, other.m2, deltas, strict=True)),
            minimum=tuple(map(min, self.minimum, other.minimum)),
            maximum=tuple(map(max, self.maximum, other.maximum)),
        )

    @property
    def std(self) -> tuple[float, ...]:
        """Population standard deviation per channel."""
        return tuple(math.sqrt(value / self.count) for value in self.m2) if self.count else ()
