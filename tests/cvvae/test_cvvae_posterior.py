"""The posterior: moments split and clamped, sampling reproducible, KL that of torch.distributions."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from cvvae import DiagonalGaussian


def test_moments_are_mean_then_clamped_logvar():
    moments = torch.cat([torch.full((1, 2, 1, 1, 1), 50.0), torch.tensor([-99.0, 99.0]).view(1, 2, 1, 1, 1)], dim=1)
    posterior = DiagonalGaussian.from_moments(moments)
    assert posterior.mode().flatten().tolist() == [50.0, 50.0]
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]


def test_sampling_follows_the_generator_and_the_moments():
    posterior = DiagonalGaussian(torch.full((1, 4, 5, 32, 32), 3.0), torch.full((1, 4, 5, 32, 32), -2.0))
    first, second = (posterior.sample(torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.mean().item() == pytest.approx(3.0, abs=0.02)
    assert first.var().log().item() == pytest.approx(-2.0, abs=0.05)


def test_kl_is_the_textbooks():
    mean, logvar = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3, 4))
    torch.testing.assert_close(DiagonalGaussian(mean, logvar).kl(), expected)


def test_odd_channels_and_unequal_shapes_are_refused():
    with pytest.raises(ValueError, match=r"even number of channels .* \(1, 3, 1, 2, 2\)"):
        DiagonalGaussian.from_moments(torch.zeros(1, 3, 1, 2, 2))
    with pytest.raises(ValueError, match="one shape"):
        DiagonalGaussian(torch.zeros(1), torch.zeros(2))
