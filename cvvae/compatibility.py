"""How far apart two VAEs' latents of the same frames are.

CV-VAE (arXiv 2405.20279, section 3.1) claims that its latents are those of an image VAE, and reports no number for
it. Here are numbers: the relative error and the cosine of paired latents, per-channel moments, the Frechet distance
of the two sets of positions, and the maximum mean discrepancy (Gretton et al. 2012, "A Kernel Two-Sample Test").

A feature is the vector of C channels at one latent position. Nothing is normalised here: give latents in the units
that the answer should have (`VideoVAE.normalize`: those that a diffusion model sees).
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from cvvae.frechet import FeatureStatistics, frechet_distance


class ChannelShift(NamedTuple):
    """Channel by channel, (C,) each: how the found latents lie to the reference's."""

    mean: Tensor
    """Difference of the means, in standard deviations of the reference."""
    std: Tensor
    """Ratio of the standard deviations; 1 is the same."""


@dataclass(slots=True)
class LatentComparison:
    """Running sums over pairs of latents of the same frames: `found` held against `reference`."""

    found: FeatureStatistics
    reference: FeatureStatistics
    squared_difference: float = 0.0
    squared_reference: float = 0.0
    cosines: float = 0.0
    """Sum over positions."""

    @classmethod
    def empty(cls, channels: int) -> Self:
        return cls(FeatureStatistics.empty(channels), FeatureStatistics.empty(channels))

    def add(self, found_BCTHW: Tensor, reference_BCTHW: Tensor) -> None:
        """Take in one more pair of (B, C, t, h, w). ValueError if the shapes differ or a number is not finite."""
        if found_BCTHW.shape != reference_BCTHW.shape:
            raise ValueError(
                f"latents: expected two of one shape, got {tuple(found_BCTHW.shape)} and "
                f"{tuple(reference_BCTHW.shape)}"
            )
        found_ND, reference_ND = (latent_features(latent).double().cpu() for latent in (found_BCTHW, reference_BCTHW))
        self.found.add(found_ND)
        self.reference.add(reference_ND)
        self.squared_difference += float((found_ND - reference_ND).square().sum())
        self.squared_reference += float(reference_ND.square().sum())
        self.cosines += float(torch.cosine_similarity(found_ND, reference_ND, dim=1).sum())

    def merge(self, other: "LatentComparison") -> None:
        """Take in what the other has seen."""
        self.found.merge(other.found)
        self.reference.merge(other.reference)
        self.squared_difference += other.squared_difference
        self.squared_reference += other.squared_reference
        self.cosines += other.cosines

    @property
    def relative_rms(self) -> float:
        """|found - reference| / |reference|, over everything; inf against a reference of zeros."""
        if self.squared_reference == 0:
            return 0.0 if self.squared_difference == 0 else float("inf")
        return (self.squared_difference / self.squared_reference) ** 0.5

    @property
    def cosine(self) -> float:
        """Mean over positions of the cosine between the two vectors of channels. ValueError if nothing was added."""
        if self.found.count == 0:
            raise ValueError("cosine: expected at least one pair of latents, got none")
        return self.cosines / self.found.count

    @property
    def frechet(self) -> float:
        """Frechet distance of the two sets of features, taken as normal distributions."""
        return frechet_distance(self.found, self.reference)

    @property
    def channel_shift(self) -> ChannelShift:
        """ValueError with fewer than two positions."""
        found_std, reference_std = channel_std(self.found), channel_std(self.reference)
        tiny = torch.finfo(torch.float64).tiny  # a channel that never changes has no scale
        return ChannelShift(
            (self.found.mean_D - self.reference.mean_D) / reference_std.clamp_min(tiny),
            found_std / reference_std.clamp_min(tiny),
        )

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON types: `from_json` reads it back without loss."""
        return {
            "count": self.found.count,
            "found": [self.found.mean_D.tolist(), self.found.deviations_DD.tolist()],
            "reference": [self.reference.mean_D.tolist(), self.reference.deviations_DD.tolist()],
            "sums": [self.squared_difference, self.squared_reference, self.cosines],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        found, reference = (
            FeatureStatistics(values["count"], *(torch.tensor(part, dtype=torch.float64) for part in values[side]))
            for side in ("found", "reference")
        )
        return cls(found, reference, *values["sums"])


def channel_std(statistics: FeatureStatistics) -> Tensor:
    """(C,) standard deviation of each channel, over N - 1. ValueError with fewer than two features."""
    return statistics.covariance.diagonal().clamp_min(0).sqrt()


def latent_features(latent_BCTHW: Tensor) -> Tensor:
    """(B, C, t, h, w) -> (B * t * h * w, C): a vector of channels for each position."""
    return latent_BCTHW.movedim(1, -1).flatten(0, -2)


# --- maximum mean discrepancy ------------------------------------------------------------------------------------


def median_distance(first_ND: Tensor, second_ND: Tensor) -> float:
    """The median of the distances between different members of the pooled sample: the usual bandwidth of a Gaussian
    kernel (Gretton et al. 2012, section 8). 1 where it is 0, as when most members are equal. ValueError with fewer
    than two members."""
    pooled_ND = torch.cat([first_ND, second_ND]).double()
    if len(pooled_ND) < 2:
        raise ValueError(f"a bandwidth: expected at least 2 features, got {len(pooled_ND)}")
    median = float(torch.pdist(pooled_ND).median())
    return median if median > 0 else 1.0


def gaussian_mmd(first_ND: Tensor, second_ND: Tensor, bandwidth: float) -> float:
    """Squared maximum mean discrepancy, kernel exp(-d^2 / (2 bandwidth^2)), unbiased: it may fall below 0.

    Member i of the two is a pair (of one frame, of one position). The U-statistic over pairs of pairs (Gretton et al.
    2012, equation 4) leaves out what compares the two members of one pair, so it is unbiased though those depend
    on each other. ValueError unless both are (N, D) with N > 1, and the bandwidth is above 0.
    """
    if first_ND.shape != second_ND.shape or first_ND.ndim != 2 or len(first_ND) < 2:
        raise ValueError(
            f"features: expected two of one shape (N > 1, D), got {tuple(first_ND.shape)} and "
            f"{tuple(second_ND.shape)}"
        )
    if not bandwidth > 0:
        raise ValueError(f"bandwidth: expected a number above 0, got {bandwidth}")
    first_ND, second_ND = first_ND.double(), second_ND.double()
    across_NN = _kernel(first_ND, second_ND, bandwidth)
    terms_NN = _kernel(first_ND, first_ND, bandwidth) + _kernel(second_ND, second_ND, bandwidth)
    terms_NN -= across_NN + across_NN.T
    count = len(first_ND)
    return float((terms_NN.sum() - terms_NN.diagonal().sum()) / (count * (count - 1)))


def _kernel(first_ND: Tensor, second_ND: Tensor, bandwidth: float) -> Tensor:
    # without the matrix product's shortcut: it loses the distances of near neighbours
    distances_NN = torch.cdist(first_ND, second_ND, compute_mode="donot_use_mm_for_euclid_dist")
    return (-(distances_NN / bandwidth).square() / 2).exp()
