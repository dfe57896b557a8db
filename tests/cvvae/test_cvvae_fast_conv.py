"""The fast convolution is nn.Conv3d, at most twice as far from float64; gradients and other dtypes are PyTorch's."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cvvae.fast_conv import FastConv3d


def relative_rms(got, exact):
    return ((got - exact).square().mean() / exact.square().mean()).sqrt().item()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("num_frames", [3, 4, 5, 8, 19])
@pytest.mark.parametrize("padding", [0, 1, (0, 1, 1)])
def test_numbers_are_those_of_the_direct_sum(padding, num_frames, batch, layout):
    torch.manual_seed(num_frames)
    conv = FastConv3d(32, 48, 3, padding=padding)
    x = torch.randn(batch, 32, num_frames, 10, 7).contiguous(memory_format=layout)
    with torch.inference_mode():
        fast = conv(x)
        direct = F.conv3d(x, conv.weight, conv.bias, padding=padding)
        exact = F.conv3d(x.double(), conv.weight.double(), conv.bias.double(), padding=padding)
    assert fast.shape == direct.shape
    assert relative_rms(fast, exact) < 1e-6
    assert relative_rms(fast, exact) < 4 * relative_rms(direct, exact)  # 1.5 to 2.3 by processor


@pytest.mark.parametrize("arguments", [{"stride": (2, 2, 2)}, {"kernel_size": 1}])
def test_other_kernels_and_strides_are_direct(arguments):
    conv = FastConv3d(8, 8, **{"kernel_size": 3, **arguments})
    x = torch.randn(1, 8, 7, 9, 9)
    with torch.inference_mode():
        torch.testing.assert_close(conv(x), F.conv3d(x, conv.weight, conv.bias, stride=conv.stride))


def test_gradients_and_other_dtypes_are_pytorchs():
    conv = FastConv3d(8, 8, 3, padding=1)
    x = torch.randn(1, 8, 5, 6, 6)
    assert torch.equal(conv(x), F.conv3d(x, conv.weight, conv.bias, padding=1))
    conv.double()
    with torch.inference_mode():
        assert torch.equal(conv(x.double()), F.conv3d(x.double(), conv.weight, conv.bias, padding=1))
