"""The Frechet distance against the textbook formula with scipy's root of a matrix."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvvae.frechet import FeatureStatistics, frechet_distance


def statistics_of(features: np.ndarray) -> FeatureStatistics:
    statistics = FeatureStatistics.empty(features.shape[1])
    statistics.add(torch.from_numpy(features))
    return statistics


def reference(first: np.ndarray, second: np.ndarray) -> float:
    covariances = [np.cov(features, rowvar=False) for features in (first, second)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    means = first.mean(axis=0) - second.mean(axis=0)
    return float(means @ means + np.trace(covariances[0] + covariances[1] - 2 * np.real(root)))


def correlated(generator: np.random.Generator, count: int, dimensions: int) -> np.ndarray:
    mixing = generator.normal(size=(dimensions, dimensions)) * np.geomspace(3, 0.05, dimensions)
    return generator.normal(size=(count, dimensions)) @ mixing.T + generator.normal(size=dimensions)


@pytest.mark.parametrize(("dimensions", "count"), [(3, 50), (40, 300), (400, 1500)])
def test_against_scipy(dimensions: int, count: int) -> None:
    generator = np.random.default_rng(dimensions)
    first, second = (correlated(generator, count, dimensions) for _ in range(2))
    expected = reference(first, second)
    assert frechet_distance(statistics_of(first), statistics_of(second)) == pytest.approx(expected, rel=1e-6)


def test_two_normal_distributions_with_a_known_distance() -> None:
    """Standard deviations 1 and 2 on both axes, means 3 apart: 9 + 2 * (1 - 2)^2."""
    first = FeatureStatistics(101, torch.zeros(2).double(), 100 * torch.eye(2).double())
    second = FeatureStatistics(101, torch.tensor([3.0, 0.0]).double(), 400 * torch.eye(2).double())
    assert frechet_distance(first, second) == pytest.approx(11.0, rel=1e-12)


def test_fewer_features_than_dimensions_stay_exact() -> None:
    """In a plane of 30 dimensions the distance is that in the plane."""
    generator = np.random.default_rng(8)
    flat = [correlated(generator, 12, 2) for _ in range(2)]
    basis, _ = np.linalg.qr(generator.normal(size=(30, 2)))
    embedded = [features @ basis.T for features in flat]
    expected = reference(*flat)
    assert frechet_distance(*map(statistics_of, embedded)) == pytest.approx(expected, rel=1e-6)


def test_a_set_has_no_distance_to_itself() -> None:
    features = np.random.default_rng(4).normal(size=(60, 20))
    assert abs(frechet_distance(statistics_of(features), statistics_of(features))) < 1e-9


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6))
def test_features_one_by_one_or_together_are_the_same(sizes: list[int]) -> None:
    features = np.random.default_rng(sum(sizes)).normal(size=(sum(sizes), 5)) * 3 + 1e4
    running, at = FeatureStatistics.empty(5), 0
    for size in sizes:
        running.add(torch.from_numpy(features[at : at + size]))
        at += size
    assert running.count == len(features)
    np.testing.assert_allclose(running.mean_D, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(running.covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-9)


def test_what_is_refused() -> None:
    statistics = FeatureStatistics.empty(4)
    with pytest.raises(ValueError, match=r"expected shape \(N, 4\), got \(2, 3\)"):
        statistics.add(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="NaN or infinity"):
        statistics.add(torch.full((1, 4), torch.nan))
    statistics.add(torch.zeros(1, 4))
    with pytest.raises(ValueError, match="at least 2 features, got 1"):
        frechet_distance(statistics, statistics)
    with pytest.raises(ValueError, match="one dimension, got 4 and 5"):
        frechet_distance(statistics, FeatureStatistics.empty(5))
