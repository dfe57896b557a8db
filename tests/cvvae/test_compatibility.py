"""Distances between latents, against values worked out by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cvvae.compatibility import LatentComparison, gaussian_mmd, latent_features, median_distance


def latent(*positions: tuple[float, ...]) -> torch.Tensor:
    """(1, C, 1, 1, w) of these vectors of channels."""
    return torch.tensor(positions, dtype=torch.float64).T[None, :, None, None, :]


def test_a_feature_is_the_channels_of_a_position() -> None:
    video = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6)
    features = latent_features(video)
    assert features.shape == (2 * 4 * 5 * 6, 3)
    assert torch.equal(features[1 + 6 * (2 + 5 * 3)], video[0, :, 3, 2, 1])
    assert torch.equal(features[-1], video[1, :, -1, -1, -1])


def test_a_comparison_by_hand() -> None:
    """Reference (3, 4) and (0, 2), found (4, 3) and (0, 4)."""
    comparison = LatentComparison.empty(2)
    comparison.add(latent((4, 3), (0, 4)), latent((3, 4), (0, 2)))
    assert comparison.relative_rms == pytest.approx(math.sqrt((1 + 1 + 0 + 4) / (9 + 16 + 0 + 4)))
    assert comparison.cosine == pytest.approx((24 / 25 + 1) / 2)
    shift = comparison.channel_shift
    # means (2, 3.5) and (1.5, 3); deviations over N - 1: sqrt(8), sqrt(0.5) and sqrt(4.5), sqrt(2)
    assert shift.mean.tolist() == pytest.approx([0.5 / math.sqrt(4.5), 0.5 / math.sqrt(2)])
    assert shift.std.tolist() == pytest.approx([math.sqrt(8 / 4.5), math.sqrt(0.5 / 2)])


def test_the_frechet_distance_of_one_channel_is_that_of_two_normal_distributions() -> None:
    """(m1 - m2)^2 + (s1 - s2)^2."""
    comparison = LatentComparison.empty(1)
    comparison.add(latent((0,), (2,)), latent((1,), (7,)))
    assert comparison.frechet == pytest.approx((1 - 4) ** 2 + (math.sqrt(2) - math.sqrt(18)) ** 2)


def test_equal_latents_are_nowhere_apart() -> None:
    comparison = LatentComparison.empty(4)
    same = torch.randn(2, 4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    comparison.add(same, same)
    assert comparison.relative_rms == 0
    assert comparison.cosine == pytest.approx(1)
    assert comparison.frechet == pytest.approx(0, abs=1e-9)


def test_zeros_have_no_relative_error() -> None:
    comparison = LatentComparison.empty(1)
    comparison.add(latent((0,)), latent((0,)))
    assert comparison.relative_rms == 0
    comparison.add(latent((1,)), latent((0,)))
    assert comparison.relative_rms == math.inf


def test_merging_is_adding_and_json_keeps_everything() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = [torch.randn(2, 1, 3, 2, 2, 2, generator=generator) for _ in range(3)]
    whole, parts = LatentComparison.empty(3), LatentComparison.empty(3)
    for found, reference in pairs:
        whole.add(found, reference)
        part = LatentComparison.empty(3)
        part.add(found, reference)
        parts.merge(LatentComparison.from_json(json.loads(json.dumps(part.to_json()))))
    assert parts.relative_rms == pytest.approx(whole.relative_rms, rel=1e-12)
    assert parts.cosine == pytest.approx(whole.cosine, rel=1e-12)
    assert parts.frechet == pytest.approx(whole.frechet, rel=1e-9)


def test_what_cannot_be_compared_is_refused() -> None:
    comparison = LatentComparison.empty(2)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 1, 1, 1\) and \(1, 2, 1, 1, 2\)"):
        comparison.add(latent((1, 2)), latent((1, 2), (3, 4)))
    with pytest.raises(ValueError, match="NaN or infinity"):
        comparison.add(latent((1, math.nan)), latent((1, 2)))
    with pytest.raises(ValueError, match="at least one pair"):
        _ = comparison.cosine
    with pytest.raises(ValueError, match="N > 1"):
        gaussian_mmd(torch.zeros(1, 2), torch.zeros(1, 2), 1.0)
    with pytest.raises(ValueError, match="bandwidth: expected a number above 0"):
        gaussian_mmd(torch.zeros(2, 2), torch.zeros(2, 2), 0.0)


def test_the_bandwidth_is_the_median_distance() -> None:
    """Points 0, 1, 3 on a line: distances 1, 2, 3."""
    assert median_distance(torch.tensor([[0.0], [1.0]]), torch.tensor([[3.0]])) == 2.0
    assert median_distance(torch.zeros(3, 2), torch.zeros(3, 2)) == 1.0


def test_mmd_by_hand() -> None:
    """Pairs (0, 1) and (2, 1): k(0, 2) + k(1, 1) - k(0, 1) - k(2, 1), twice, over two."""
    found = gaussian_mmd(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0], [1.0]]), bandwidth=1.0)
    assert found == pytest.approx(math.exp(-2) + 1 - 2 * math.exp(-0.5))


def test_mmd_tells_distributions_apart_and_equal_ones_not() -> None:
    generator = torch.Generator().manual_seed(2)
    one, other = torch.randn(2, 400, 4, generator=generator)
    bandwidth = median_distance(one, other)
    assert abs(gaussian_mmd(one, other, bandwidth)) < 5e-3
    assert gaussian_mmd(one, 2 * other, bandwidth) > 0.02
    assert gaussian_mmd(one, one, bandwidth) == pytest.approx(0, abs=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**31))
def test_mmd_does_not_know_which_came_first(count: int, channels: int, seed: int) -> None:
    first, second = torch.randn(2, count, channels, generator=torch.Generator().manual_seed(seed))
    assert gaussian_mmd(first, second, 1.3) == pytest.approx(gaussian_mmd(second, first, 1.3), abs=1e-12)
