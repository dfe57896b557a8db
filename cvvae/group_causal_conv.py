"""The group causal convolution of IV-VAE (arXiv 2411.06449, section 3.3): causal between groups of frames only.

A kernel of 3 frames runs over each group of `group` frames, padded with the last frame of the group before and with
one frame of zeros. A stream is therefore continued with one frame, and any number of groups may be computed at once.
The video's very first frame stands alone: its input is [x, x, 0], so it is a 2-D convolution with W0 + W1.

On a CPU in fp32 without gradients, two frames are computed with four 2-D convolutions instead of six (see
cvvae/fast_conv.py for the method and what it gives up); elsewhere PyTorch convolves all groups as one batch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


def group_causal_conv(
    x_BCTHW: Tensor, previous: Tensor, weight: Tensor, bias: Tensor, *, group: int, out: Tensor | None = None
) -> Tensor:
    """(B, C, n * group, H, W) after the frame `previous`, (B, C, 1, H, W) -> (B, C', n * group, H, W).

    `weight` is (C', C, 3, 3, 3); sides are padded with zeros. Input and output are channels-last-3d. The answer is
    written to `out` if that is given, which may be some channels of a larger tensor: without gradients only.
    """
    assert x_BCTHW.shape[2] % group == 0, "the caller hands over whole groups"
    convolve = _way_to_convolve(x_BCTHW, group)
    if convolve is not None:
        out = empty_channels_last(x_BCTHW, weight.shape[0]) if out is None else out
        convolve(x_BCTHW, previous, weight, bias, group, out)
        return out
    padded = _padded_groups(x_BCTHW, previous, group)
    folded = F.conv3d(padded, weight, bias, padding=(0, 1, 1))
    answer_BnTHWC = folded.movedim(1, -1).unflatten(0, (x_BCTHW.shape[0], -1))
    answer = answer_BnTHWC.flatten(1, 2).movedim(-1, 1)
    return answer if out is None else out.copy_(answer)


def _way_to_convolve(x: Tensor, group: int) -> Callable[..., None] | None:
    """What is faster than one batch of padded groups: nothing on a GPU, with gradients or compiled."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling() or group == 1:
        return None
    if x.dtype == torch.float32 and torch.backends.mkldnn.is_available() and group % 2 == 0:
        return _two_frames_at_once
    return _group_by_group


def _padded_groups(x_BCTHW: Tensor, previous: Tensor, group: int) -> Tensor:
    """Every group with the frame before it and zeros after it, as one batch (B * n, C, group + 2, H, W)."""
    # with channels last all of this is one copy, and the result is again channels-last
    groups_BnTHWC = x_BCTHW.movedim(1, -1).unflatten(1, (-1, group))
    first_BnTHWC = previous.movedim(1, -1).unsqueeze(1)
    before_BnTHWC = torch.cat([first_BnTHWC, groups_BnTHWC[:, :-1, -1:]], dim=1)
    padded = torch.cat([before_BnTHWC, groups_BnTHWC, torch.zeros_like(before_BnTHWC)], dim=2)
    return padded.flatten(0, 1).movedim(-1, 1)


def _group_by_group(x: Tensor, previous: Tensor, weight: Tensor, bias: Tensor, group: int, out: Tensor) -> None:
    """Reads every group but the first where it lies, and leaves out the kernel's last frame where it meets zeros."""
    without_last = weight[:, :, :2].contiguous(memory_format=torch.channels_last_3d)
    for clip in range(x.shape[0]):
        frames, answers = x[clip : clip + 1], out[clip : clip + 1]
        first = torch.cat([previous[clip : clip + 1], frames[:, :, :group]], dim=2)
        for start in range(0, x.shape[2], group):
            window = frames[:, :, start - 1 : start + group] if start else first
            last = start + group - 1
            answers[:, :, start:last] = F.conv3d(window, weight, bias, padding=(0, 1, 1))
            answers[:, :, last : last + 1] = F.conv3d(window[:, :, -2:], without_last, bias, padding=(0, 1, 1))


def _two_frames_at_once(x: Tensor, previous: Tensor, weight: Tensor, bias: Tensor, group: int, out: Tensor) -> None:
    """Winograd's F(2, 3), see `cvvae.fast_conv._winograd_in_time`; no padded copy is made.

    d1 and d2 are the frames of a pair, d0 the frame before, d3 the frame after: zero where a group ends.
    """
    d1, d2 = x[:, :, 0::2], x[:, :, 1::2]
    g0, g1, g2 = weight.unbind(2)
    even, odd = out[:, :, 0::2], out[:, :, 1::2]
    scratch = torch.empty_like(d1, memory_format=torch.channels_last_3d)

    torch.add(d1, d2, out=scratch)
    first = _convolve_frames(scratch, (g0 + g1 + g2) / 2, bias)
    torch.sub(d2, d1, out=scratch)
    difference = _convolve_frames(scratch, (g0 - g1 + g2) / 2, None)
    torch.add(first, difference, out=even)
    torch.sub(first, difference, out=odd)
    del first, difference
    torch.sub(previous, d2[:, :, :1], out=scratch[:, :, :1])
    torch.sub(d2[:, :, :-1], d2[:, :, 1:], out=scratch[:, :, 1:])
    even += _convolve_frames(scratch, g0, None)
    scratch.copy_(d1)
    pairs = scratch.unflatten(2, (-1, group // 2))
    pairs[:, :, :, :-1] -= d1.unflatten(2, (-1, group // 2))[:, :, :, 1:]
    odd -= _convolve_frames(scratch, g2, None)


def _convolve_frames(frames_BCTHW: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """A 2-D convolution of every frame; not F.conv2d, which sends small inputs to a slower loop."""
    frames = frames_BCTHW.transpose(1, 2).flatten(0, 1)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    out = torch.mkldnn_convolution(frames, kernel, bias, (1, 1), (1, 1), (1, 1), 1)
    return out.unflatten(0, (frames_BCTHW.shape[0], -1)).transpose(1, 2)


def empty_channels_last(like_BCTHW: Tensor, channels: int) -> Tensor:
    """An uninitialised tensor of the same clips, frames and sides, channels-last-3d."""
    batch, _, *sizes = like_BCTHW.shape
    return like_BCTHW.new_empty(batch, *sizes, channels).movedim(-1, 1)
