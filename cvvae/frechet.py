"""Frechet distance between two sets of feature vectors, from running statistics: what FVD and FID are.

Features are not kept: a set of any size is its count, its mean and its covariance, in float64.
"""

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(slots=True)
class FeatureStatistics:
    """Count, mean (D,) and summed outer products of deviations (D, D) of the features seen so far, on the CPU."""

    count: int
    mean_D: Tensor
    deviations_DD: Tensor

    @classmethod
    def empty(cls, dimensions: int) -> Self:
        return cls(
            0, torch.zeros(dimensions, dtype=torch.float64), torch.zeros(dimensions, dimensions, dtype=torch.float64)
        )

    def add(self, features_ND: Tensor) -> None:
        """Take in N more features. ValueError if they are not (N, D) or not all finite."""
        if features_ND.ndim != 2 or features_ND.shape[1] != len(self.mean_D):
            raise ValueError(f"features: expected shape (N, {len(self.mean_D)}), got {tuple(features_ND.shape)}")
        if not torch.isfinite(features_ND).all():
            raise ValueError("features: expected finite numbers, got NaN or infinity")
        features_ND = features_ND.detach().cpu().double()
        mean_D = features_ND.mean(dim=0)
        centred_ND = features_ND - mean_D
        self.merge(FeatureStatistics(len(features_ND), mean_D, centred_ND.T @ centred_ND))

    def merge(self, other: "FeatureStatistics") -> None:
        """Take in what the other has seen (Chan, Golub and LeVeque 1979: no difference of large sums)."""
        if other.count == 0:
            return
        total = self.count + other.count
        step_D = other.mean_D - self.mean_D
        self.deviations_DD = (
            self.deviations_DD
            + other.deviations_DD
            + torch.outer(step_D, step_D) * (self.count * other.count / total)
        )
        self.mean_D = self.mean_D + step_D * (other.count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Divided by N - 1, as numpy.cov does. ValueError with fewer than two features."""
        if self.count < 2:
            raise ValueError(f"a covariance: expected at least 2 features, got {self.count}")
        return self.deviations_DD / (self.count - 1)


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|m1 - m2|^2 + trace(S1 + S2 - 2 (S1 S2)^(1/2)) of two normal distributions (Heusel et al. 2017, equation 6).

    The trace of (S1 S2)^(1/2) is the sum of the singular values of S1^(1/2) S2^(1/2), both symmetric: unlike the root
    of the product it stays exact where there are fewer features than dimensions. ValueError with fewer than two
    features in a set or different dimensions.
    """
    if len(first.mean_D) != len(second.mean_D):
        raise ValueError(
            f"Frechet distance: expected features of one dimension, got {len(first.mean_D)} and {len(second.mean_D)}"
        )
    covariance_1, covariance_2 = first.covariance, second.covariance
    singular_values = torch.linalg.svdvals(_square_root(covariance_1) @ _square_root(covariance_2))
    means = (first.mean_D - second.mean_D).square().sum()
    return float(means + covariance_1.trace() + covariance_2.trace() - 2 * singular_values.sum())


def _square_root(symmetric_DD: Tensor) -> Tensor:
    """Of a positive semi-definite matrix. Eigenvalues within rounding of 0 count as 0: there may be hundreds, and the
    roots of tiny numbers are not tiny."""
    eigenvalues_D, vectors_DD = torch.linalg.eigh(symmetric_DD)
    rounding = eigenvalues_D.abs().max() * len(eigenvalues_D) * torch.finfo(eigenvalues_D.dtype).eps
    roots_D = torch.where(eigenvalues_D > rounding, eigenvalues_D, 0.0).sqrt()
    return (vectors_DD * roots_D) @ vectors_DD.T
