"""CV-VAE's 3-D patch discriminator (arXiv 2405.20279 and the authors' code), under the keys of its checkpoints.

A clip (B, 3, T, H, W) in [-1, 1] becomes one logit for each patch of 8 x 8 pixels and up to 8 frames. Checked against
the authors' module: tests/golden, tests/cvvae/test_discriminator.py.
"""

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.fast_conv import FastConv3d
from cvvae.layers import ConvFactory, FrameConv2d, NormSilu
from cvvae.weights import check_tensors

CHECKPOINT_PREFIX = "loss.discriminator."
"""Before its keys in the authors' training states."""

_GROUPS, _EPS = 32, 1e-5
_TIME_EMBEDDING = 512
_SLOPE = 0.2
_conv3: ConvFactory = partial(FastConv3d, kernel_size=3, padding=1)


class PatchDiscriminator3d(nn.Module):
    """(B, 3, T, H, W) in [-1, 1] -> logits (B, 1, t, H/8, W/8), high for real; T of 17 gives 3, of 1 gives 1.

    Of the parameters those of `temb_proj` are unused: the published checkpoints have them.
    """

    def __init__(self, *, in_channels: int = 3, width: int = 64, half_3d: bool = False) -> None:
        """`width` is a multiple of 32, else ValueError; `half_3d` makes each block's second convolution 2-D."""
        if width < 1 or width % _GROUPS:
            raise ValueError(f"discriminator: width: expected a positive multiple of {_GROUPS}, got {width}")
        super().__init__()
        widths = (width, 2 * width, 4 * width, 8 * width, 8 * width)
        layers: list[nn.Module] = [FastConv3d(in_channels, width, 3, stride=2, padding=1), nn.LeakyReLU(_SLOPE)]
        for number in range(len(widths) - 1):
            halves = number < 2
            layers += [
                DiscriminatorBlock(widths[number], widths[number + 1], halves=halves, half_3d=half_3d),
                nn.GroupNorm(_GROUPS, widths[number + 1], _EPS),
                nn.LeakyReLU(_SLOPE),
            ]
        layers.append(_conv3(widths[-1], 1))
        self.main = nn.Sequential(*layers)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        return self.main(video_BCTHW.contiguous(memory_format=torch.channels_last_3d))

    def initialise(self, generator: torch.Generator | None = None) -> None:
        """The authors' start: kernels of convolutions from N(0, 0.02), everything else as PyTorch has it."""
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02, generator=generator)

    def load_checkpoint(self, tensors: Mapping[str, Tensor], *, where: str) -> None:
        """Weights under the authors' keys, bare or as in a training state. ValueError listing what does not match."""
        prefixed = {key for key in tensors if key.startswith(CHECKPOINT_PREFIX)}
        own = {key.removeprefix(CHECKPOINT_PREFIX): tensors[key] for key in prefixed or tensors}
        check_tensors(own, self, where=where)
        self.load_state_dict(dict(own))


class DiscriminatorBlock(nn.Module):
    """A residual block; where it halves, both branches are pooled alike. The shortcut is 1x1x1 if channels change."""

    def __init__(self, in_channels: int, out_channels: int, *, halves: bool, half_3d: bool) -> None:
        super().__init__()
        self.halves = halves
        self.norm1 = NormSilu(_GROUPS, in_channels, _EPS)
        self.conv1 = _conv3(in_channels, out_channels)
        self.temb_proj = nn.Linear(_TIME_EMBEDDING, out_channels).requires_grad_(False)
        self.norm2 = NormSilu(_GROUPS, out_channels, _EPS)
        conv2 = partial(FrameConv2d, kernel_size=3, padding=1) if half_3d else _conv3
        self.conv2 = conv2(out_channels, out_channels)
        self.nin_shortcut = FastConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        h = self.conv1(self.norm1(x_BCTHW))
        if self.halves:
            h, x_BCTHW = _pool(h), _pool(x_BCTHW)
        shortcut = x_BCTHW if self.nin_shortcut is None else self.nin_shortcut(x_BCTHW)
        return shortcut + self.conv2(self.norm2(h))


def _pool(x_BCTHW: Tensor) -> Tensor:
    """Means of 2 x 2 x 2 values; an odd number of frames gets its first one twice."""
    if x_BCTHW.shape[2] % 2:
        x_BCTHW = torch.cat([x_BCTHW[:, :, :1], x_BCTHW], dim=2)
    return F.avg_pool3d(x_BCTHW, 2)
