"""The probe passes PyTorch's own convolutions here, and finds wrong and slow ones."""

import math
import time

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from cvvae.conv_probe import ConvProbe, probe_conv3d

CPU = torch.device("cpu")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolutions_of_this_machine_are_right(dtype, layout):
    probe = probe_conv3d(dtype, CPU, layout)
    assert 0 < probe.relative_rms < 0.005
    assert not probe.is_wrong
    assert probe.slowdown > 0
    assert probe.extra_bytes is None


def one_pixel_wrong(input, weight, *, stride=(1, 1, 1)):
    """Wrong only where pytorch #169688 was: strided, and one pixel wide."""
    out = F.conv3d(input, weight, stride=stride)
    return out * 1.1 if out.shape[-1] == 1 else out


def not_a_number(input, weight, *, stride=(1, 1, 1)):
    return F.conv3d(input, weight, stride=stride) * math.nan


def slow(input, weight, *, stride=(1, 1, 1)):
    time.sleep(0.5)
    return F.conv3d(input, weight, stride=stride)


@pytest.mark.parametrize("convolve", [one_pixel_wrong, not_a_number])
def test_a_wrong_convolution_is_found(convolve):
    assert probe_conv3d(torch.bfloat16, CPU, torch.channels_last_3d, convolve=convolve).is_wrong


def test_a_slow_convolution_is_found():
    probe = probe_conv3d(torch.bfloat16, CPU, torch.channels_last_3d, convolve=slow)
    assert probe.is_slow
    assert not probe.is_wrong


def test_bounds():
    assert not ConvProbe(0.002, 1.0, None).is_wrong
    assert not ConvProbe(0.002, 1.0, None).is_slow
    assert ConvProbe(0.05, 1.0, None).is_wrong
    assert ConvProbe(0.002, 4.0, None).is_slow


@pytest.mark.gpu
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_convolutions_of_this_gpu_are_right(dtype, layout):
    probe = probe_conv3d(dtype, torch.device("cuda"), layout)
    assert not probe.is_wrong
    assert probe.extra_bytes is not None
