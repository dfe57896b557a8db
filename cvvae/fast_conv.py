"""The 3-D convolution of this package: nn.Conv3d, with two shortcuts for fp32 inference on a CPU.

A CPU spends nine tenths of the time in fp32 convolutions that already run at its peak, so only fewer multiplications
help. Layers of kernel 3 and stride 1 therefore use Winograd's minimal filtering F(2, 3) along time (Lavin and Gray,
arXiv 1509.09308, section 4.1): two output frames cost four 2-D convolutions instead of six. What it gives up:
a whole encoder's distance to float64 grows from 1.5e-6 to 2.9e-6 (relative RMS, tiny z = 4 model), and results with
and without gradients differ in their last bits. Half precision, gradients and GPUs take PyTorch's way.
"""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class FastConv3d(nn.Conv3d):
    """nn.Conv3d without dilation or groups, zero-padded; same parameters, same numbers up to rounding."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        not_ours = input.device.type != "cpu" or input.dtype != torch.float32 or weight.dtype != torch.float32
        not_ours = not_ours or torch.compiler.is_compiling()  # the compiler cannot see through what follows
        if not_ours or torch.is_grad_enabled() or not torch.backends.mkldnn.is_available():
            return super()._conv_forward(input, weight, bias)
        before, top, left = (int(side) for side in self.padding)
        num_frames_out = input.shape[2] + 2 * before - 2
        if self.kernel_size == (3, 3, 3) and self.stride == (1, 1, 1) and num_frames_out >= 2:
            padded = F.pad(input, (0, 0, 0, 0, before, before)) if before else input
            return _winograd_in_time(padded, weight, bias, (top, left))
        # PyTorch itself would send one clip with batch * C * T * H <= 20480 to a loop over im2col, several times
        # slower: the first convolution of every clip, and most of a narrow model
        return torch.mkldnn_convolution(input, weight, bias, (before, top, left), self.stride, self.dilation, 1)


def _winograd_in_time(x: Tensor, weight: Tensor, bias: Tensor | None, padding: tuple[int, int]) -> Tensor:
    """Kernel-3 convolution of (B, C, T + 2, H, W), padded in time already, to (B, C', T, H', W').

    With d0..d3 four successive frames and g0..g2 the kernel's frames, the outputs at d2 and d3 are m1 + m2 + m3 and
    m2 - m3 - m4, where m1 = (d0 - d2) g0, m2 = (d1 + d2)(g0 + g1 + g2)/2, m3 = (d2 - d1)(g0 - g1 + g2)/2,
    m4 = (d1 - d3) g2. A first output frame left over by an odd T is computed directly.
    """
    batch, channels, _, height, width = x.shape
    num_frames = x.shape[2] - 2
    num_pairs, left_over = divmod(num_frames, 2)
    d0, d1, d2, d3 = (x[:, :, left_over + k :: 2][:, :, :num_pairs] for k in range(4))
    g0, g1, g2 = weight.unbind(2)
    # one scratch for all four inputs: fresh memory of this size costs more than the additions
    scratch = x.new_empty(batch, num_pairs, height, width, channels).permute(0, 4, 1, 2, 3)

    def convolve(kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        frames = scratch.transpose(1, 2).flatten(0, 1)
        kernel = kernel.contiguous(memory_format=torch.channels_last)
        out = torch.mkldnn_convolution(frames, kernel, bias, padding, (1, 1), (1, 1), 1)
        return out.unflatten(0, (batch, num_pairs)).transpose(1, 2)

    torch.add(d1, d2, out=scratch)
    first = convolve((g0 + g1 + g2) / 2, bias)
    shape = (batch, num_frames, *first.shape[-2:], weight.shape[0])
    out_BCTHW = x.new_empty(shape).permute(0, 4, 1, 2, 3)
    pair_first, pair_second = out_BCTHW[:, :, left_over::2], out_BCTHW[:, :, left_over + 1 :: 2]
    torch.sub(d2, d1, out=scratch)
    difference = convolve((g0 - g1 + g2) / 2)
    torch.add(first, difference, out=pair_first)
    torch.sub(first, difference, out=pair_second)
    del first, difference
    torch.sub(d0, d2, out=scratch)
    pair_first += convolve(g0)
    torch.sub(d1, d3, out=scratch)
    pair_second -= convolve(g2)
    if left_over:
        out_BCTHW[:, :, :1] = torch.mkldnn_convolution(
            x[:, :, :3], weight, bias, (0, *padding), (1, 1, 1), (1, 1, 1), 1
        )
    return out_BCTHW
