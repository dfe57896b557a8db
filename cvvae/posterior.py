"""What an encoder returns: a diagonal Gaussian per latent position.

Encoders answer with moments_BCTHW, (B, 2C, t, h, w): the mean in the first C channels, the log variance in the rest.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

# Outside this range exp(logvar) over- or underflows in half precision; the reference clamps the same way.
LOGVAR_RANGE = (-30.0, 20.0)


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """Independent normals: raw (not normalised) `mean` and `logvar`, both (B, C, t, h, w), logvar in [-30, 20]."""

    mean: Tensor
    logvar: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.logvar.shape:
            raise ValueError(
                f"DiagonalGaussian: expected mean and logvar of one shape, "
                f"got {tuple(self.mean.shape)} and {tuple(self.logvar.shape)}"
            )

    @classmethod
    def from_moments(cls, moments_BCTHW: Tensor) -> Self:
        """Splits (B, 2C, ...) into mean and logvar and clamps the logvar. ValueError on an odd channel count."""
        if moments_BCTHW.ndim < 2 or moments_BCTHW.shape[1] % 2:
            raise ValueError(
                f"moments_BCTHW: expected an even number of channels (mean, logvar), "
                f"got shape {tuple(moments_BCTHW.shape)}"
            )
        mean, logvar = moments_BCTHW.chunk(2, dim=1)
        return cls(mean, logvar.clamp(*LOGVAR_RANGE))

    def mode(self) -> Tensor:
        """The most likely latent: the mean."""
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """One draw, differentiable in mean and logvar. `generator` must live on the tensors' device."""
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device, dtype=self.mean.dtype)
        return self.mean + (0.5 * self.logvar).exp() * noise

    def kl(self) -> Tensor:
        """KL divergence to the standard normal in nats, summed over a sample's latent: shape (B,)."""
        per_position = self.mean.square() + self.logvar.exp() - 1.0 - self.logvar
        return 0.5 * per_position.flatten(1).sum(dim=1)
