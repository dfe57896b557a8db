"""The causal convolution of OD-VAE and Open-Sora, whose checkpoints keep its kernel one name deeper, under `conv`."""

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.fast_conv import FastConv3d

FramesBefore = Literal["zeros", "first frame"]


class CausalConv3d(nn.Module):
    """(B, C, T, H, W) -> (B, C', T', H', W') where no output frame sees a later input frame.

    Space is padded with zeros by half a kernel. Time is padded in front only, by kernel - stride frames: with zeros,
    or with copies of the first frame.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
        before: FramesBefore,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.before: FramesBefore = before
        self.num_before = kernel[0] - stride[0]
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        self.conv = FastConv3d(in_channels, out_channels, kernel, stride=stride, padding=padding, bias=bias)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        if self.num_before and self.before == "zeros":
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, self.num_before, 0))
        elif self.num_before:
            x_BCTHW = torch.cat([x_BCTHW[:, :, :1]] * self.num_before + [x_BCTHW], dim=2)
        return self.conv(x_BCTHW)
