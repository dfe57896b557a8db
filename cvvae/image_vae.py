"""The image VAE of Stable Diffusion, with the key names of diffusers' AutoencoderKL.

Two networks of frames (N, C, H, W), the first stage of Open-Sora's video VAE. Norms see one frame at a time.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.layers import AttentionNames, NamedSequence, NormSilu, ResBlock, SpatialAttention

NORM_GROUPS = 32
"""Stable Diffusion's. With fewer channels than a few per group a norm takes each channel's own level away."""
NUM_RES_BLOCKS = 2
"""Per encoder level; the decoder has one more."""
_EPS = 1e-6

_NamedBlocks = Iterator[tuple[str, nn.Module]]
_conv3 = partial(nn.Conv2d, kernel_size=3, padding=1)
_res_block = partial(
    ResBlock,
    conv1=_conv3,
    conv2=_conv3,
    shortcut=("conv_shortcut", partial(nn.Conv2d, kernel_size=1)),
    eps=_EPS,
)
_ATTENTION = AttentionNames("group_norm", "to_q", "to_k", "to_v", "to_out.0", as_conv=False)


class ImageVAE(nn.Module):
    """Frames in [-1, 1] <-> moments and latents of an image VAE; sides are divided by 2 ** (levels - 1)."""

    def __init__(
        self, *, in_channels: int, latent_channels: int, widths: Sequence[int], norm_groups: int = NORM_GROUPS
    ) -> None:
        """`widths` are the channels of each level, finest first: multiples of `norm_groups`."""
        super().__init__()
        self.in_channels = in_channels
        self.latent_channels = latent_channels
        self.widths = tuple(widths)
        self.norm_groups = norm_groups
        self.encoder = NamedSequence(_encoder_blocks(in_channels, 2 * latent_channels, widths, norm_groups))
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = NamedSequence(_decoder_blocks(latent_channels, in_channels, widths, norm_groups))

    def encode(self, frames: Tensor) -> Tensor:
        """(N, 3, H, W) -> moments (N, 2C, h, w), the mean first."""
        return self.quant_conv(self.encoder(frames))

    def decode(self, latents: Tensor) -> Tensor:
        """(N, C, h, w) -> frames (N, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(latents))


class _Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(F.pad(frames, (0, 1, 0, 1)))  # zeros right and below only


class _Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv3(channels, channels)

    def forward(self, frames: Tensor) -> Tensor:
        return self.conv(F.interpolate(frames, scale_factor=2.0, mode="nearest"))


class _FrameAttention(SpatialAttention):
    """The attention of the video models, for frames without a time axis."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(2)).squeeze(2)


def _mid_blocks(width: int, groups: int) -> _NamedBlocks:
    yield "mid_block.resnets.0", _res_block(width, width, groups=groups)
    yield "mid_block.attentions.0", _FrameAttention(width, names=_ATTENTION, groups=groups, eps=_EPS)
    yield "mid_block.resnets.1", _res_block(width, width, groups=groups)


def _encoder_blocks(in_channels: int, out_channels: int, widths: Sequence[int], groups: int) -> _NamedBlocks:
    width = widths[0]
    yield "conv_in", _conv3(in_channels, width)
    for level, level_width in enumerate(widths):
        for block in range(NUM_RES_BLOCKS):
            yield f"down_blocks.{level}.resnets.{block}", _res_block(width, level_width, groups=groups)
            width = level_width
        if level < len(widths) - 1:
            yield f"down_blocks.{level}.downsamplers.0", _Downsample(width)
    yield from _mid_blocks(width, groups)
    yield "conv_norm_out", NormSilu(groups, width, _EPS)
    yield "conv_out", _conv3(width, out_channels)


def _decoder_blocks(in_channels: int, out_channels: int, widths: Sequence[int], groups: int) -> _NamedBlocks:
    width = widths[-1]
    yield "conv_in", _conv3(in_channels, width)
    yield from _mid_blocks(width, groups)
    for number, level_width in enumerate(reversed(widths)):
        for block in range(NUM_RES_BLOCKS + 1):
            yield f"up_blocks.{number}.resnets.{block}", _res_block(width, level_width, groups=groups)
            width = level_width
        if number < len(widths) - 1:
            yield f"up_blocks.{number}.upsamplers.0", _Upsample(width)
    yield "conv_norm_out", NormSilu(groups, width, _EPS)
    yield "conv_out", _conv3(width, out_channels)
