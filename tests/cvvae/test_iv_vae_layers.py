"""IV-VAE's layers against their definitions, in every way they are computed; and the memory they need."""

import weakref

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvvae import SPECS, seeded_vae
from cvvae.group_causal_conv import group_causal_conv
from cvvae.iv_vae_layers import BranchNormSilu, CausalConv, GroupCausalConv, Stream, rms_norm


def channels_last(*shape, seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last_3d)


def by_definition(x, previous, weight, bias, group):
    """Each frame by itself in fp64: three 2-D convolutions, of the frames before, at and after it."""
    x, previous, weight, bias = (tensor.double() for tensor in (x, previous, weight, bias))
    out = []
    for frame in range(x.shape[2]):
        before = x[:, :, frame - 1] if frame else previous[:, :, 0]
        after = torch.zeros_like(before) if frame % group == group - 1 else x[:, :, frame + 1]
        taps = zip((before, x[:, :, frame], after), weight.unbind(2), strict=True)
        out.append(sum(F.conv2d(image, kernel, padding=1) for image, kernel in taps) + bias.view(-1, 1, 1))
    return torch.stack(out, dim=2)


@settings(max_examples=20, deadline=None)
@given(
    group=st.sampled_from([1, 2, 4]),
    num_groups=st.integers(1, 3),
    batch=st.integers(1, 2),
    way=st.sampled_from(["fp32", "gradients", "bf16"]),
    to_channels_of_another=st.booleans(),
)
def test_group_causal_convolution_is_its_definition(group, num_groups, batch, way, to_channels_of_another):
    x, previous = channels_last(batch, 5, num_groups * group, 4, 6), channels_last(batch, 5, 1, 4, 6, seed=1)
    weight, bias = channels_last(6, 5, 3, 3, 3, seed=2) / 12, torch.linspace(-1, 1, 6)
    expected = by_definition(x, previous, weight, bias, group)
    dtype = torch.bfloat16 if way == "bf16" else torch.float32
    larger = torch.zeros(batch, num_groups * group, 4, 6, 12, dtype=dtype).movedim(-1, 1)
    out = larger[:, 6:] if to_channels_of_another and way != "gradients" else None
    with torch.set_grad_enabled(way == "gradients"):
        arguments = [tensor.to(dtype) for tensor in (x, previous, weight, bias)]
        got = group_causal_conv(*arguments, group=group, out=out)
    tolerance = 0.05 if way == "bf16" else 1e-5
    torch.testing.assert_close(got.double(), expected, rtol=0, atol=tolerance)
    if out is not None:
        assert got.data_ptr() == out.data_ptr()
        assert not larger[:, :6].any()


@pytest.mark.parametrize(
    ("conv", "padded"),
    [(GroupCausalConv(4, 5, group=4), "x x 0"), (CausalConv(4, 5), "x x x")],
    ids=["group", "causal"],
)
def test_the_first_frame_is_padded_with_itself(conv, padded):
    x = channels_last(1, 4, 1, 6, 6)
    frames = [x if letter == "x" else torch.zeros_like(x) for letter in padded.split()]
    expected = F.conv3d(torch.cat(frames, dim=2), conv.weight, conv.bias, padding=(0, 1, 1))
    got = F.conv2d(x[:, :, 0], conv.kernel_of_first_frame(), conv.bias, padding=1)
    torch.testing.assert_close(got, expected[:, :, 0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("with_gradients", [False, True])
def test_the_norm_is_safe_where_half_precision_is_not(dtype, with_gradients):
    norm = BranchNormSilu(16, num_branches=2)
    with torch.no_grad():
        norm.gamma.copy_(torch.linspace(0.5, 1.5, 16).view(-1, 1, 1, 1))
    x = channels_last(2, 16, 3, 2, 2)
    x[0] *= 300  # squares overflow in fp16
    x[1] *= 1e-4  # and vanish
    x[1, :8, 1] = 0  # 0 / 0
    x = x.to(dtype)
    with torch.set_grad_enabled(with_gradients):
        got = norm(x, Stream(None))
    halves = [F.normalize(half, dim=1) * 8**0.5 for half in x.double().chunk(2, dim=1)]
    expected = F.silu(torch.cat(halves, dim=1) * norm.gamma.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=0, atol={torch.float32: 1e-6}.get(dtype, 0.02))


def test_the_norm_has_gradients():
    x, gamma = torch.randn(3, 4, dtype=torch.float32, requires_grad=True), torch.ones(4, requires_grad=True)
    rms_norm(x, gamma).square().sum().backward()
    torch.testing.assert_close(gamma.grad, 2 * (F.normalize(x.detach(), dim=-1).square() * 4).sum(0))


def test_fp16_moments_are_finite_and_near():
    video = torch.zeros(1, 3, 5, 8, 8)
    video[:, :, 1:] = torch.rand(1, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        expected = seeded_vae(SPECS["ivvae-z4-tiny"], seed=2).encode(video).mean
        got = seeded_vae(SPECS["ivvae-z4-tiny"], seed=2).half().encode(video.half()).mean
    torch.testing.assert_close(got.float(), expected, rtol=0, atol=0.02)


class LiveBytes(TorchDispatchMode):
    """The largest sum of tensors that were alive at once, made while it is on; views of `given` do not count."""

    def __init__(self, *given):
        super().__init__()
        self.live, self.peak, self._finalizers = 0, 0, {}
        self._given = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        return answer

    def _count(self, storage):
        key = storage._cdata
        if key not in self._finalizers and key not in self._given:
            self._finalizers[key] = weakref.finalize(storage, self._forget, key, storage.nbytes())
            self.live += storage.nbytes()

    def _forget(self, key, nbytes):
        del self._finalizers[key]
        self.live -= nbytes


@torch.no_grad()
def test_memory_beyond_input_and_output_does_not_grow_with_the_video():
    vae = seeded_vae(SPECS["ivvae-z4-tiny"], seed=2)
    working = {}
    for num_frames in (33, 129):
        video = torch.zeros(1, 3, num_frames, 32, 32)
        with LiveBytes(video, *vae.parameters()) as encoding:
            posterior = vae.encode(video)
        with LiveBytes(posterior.mean, *vae.parameters()) as decoding:
            pixels = vae.decode(posterior.mean)
        answers = 2 * posterior.mean.nbytes, pixels.nbytes  # the moments of both
        working[num_frames] = [
            meter.peak - answer for meter, answer in zip((encoding, decoding), answers, strict=True)
        ]
    assert min(working[33]) > 100_000
    assert working[129] == working[33]
