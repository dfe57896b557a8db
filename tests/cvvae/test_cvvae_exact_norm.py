"""The exact norm is group norm and SiLU to the last bits of fp32, however large the clip and its mean."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cvvae.exact_norm import can_norm_exactly, group_norm_silu
from cvvae.layers import NormSilu


def relative_rms(got, exact):
    return ((got - exact).square().mean() / exact.square().mean()).sqrt().item()


def channels_last(*shape, mean=0.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(*shape, generator=generator) + mean
    return x.contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("mean", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("shape", [(1, 32, 1, 1, 1), (2, 64, 3, 5, 7), (1, 64, 17, 96, 96)])
def test_numbers_are_those_of_float64(shape, mean):
    x = channels_last(*shape, mean=mean)
    weight, bias = torch.randn(2, shape[1], generator=torch.Generator().manual_seed(1))
    exact = F.silu(F.group_norm(x.double().contiguous(), 16, weight.double(), bias.double(), 1e-5))
    with torch.inference_mode():
        got = group_norm_silu(x, 16, weight, bias, 1e-5)
    assert got.shape == x.shape
    assert got.is_contiguous(memory_format=torch.channels_last_3d)
    # a large mean costs digits when it is subtracted, whoever does it
    assert relative_rms(got, exact) < 1e-6 * (1 + mean)


def test_a_clip_is_normed_alone():
    x = channels_last(3, 32, 5, 8, 8)
    norm = NormSilu(32, 32, 1e-5)
    with torch.inference_mode():
        assert torch.equal(norm(x)[1:2], norm(x[1:2]))


def test_gradients_other_layouts_and_dtypes_are_pytorchs():
    x = channels_last(1, 32, 5, 8, 8)
    assert not can_norm_exactly(x)
    with torch.inference_mode():
        assert can_norm_exactly(x)
        assert not can_norm_exactly(x.contiguous())
        assert not can_norm_exactly(x.bfloat16())
    norm = NormSilu(32, 32, 1e-5)
    norm(x.requires_grad_()).sum().backward()  # PyTorch 2.13 crashes where only the weight asks for one
    assert norm.weight.grad is not None
