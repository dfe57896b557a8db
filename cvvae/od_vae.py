"""OD-VAE (arXiv 2409.01199), the causal video VAE of Open-Sora-Plan 1.2.

4x8x8, z = 4. The encoder's two finest levels are 2-D and see frames one by one; all else is 3-D and causal in its
convolutions. Not causal in effect: group norm pools over the frames of a tile, so other tiles give other latents, and
the tile plan below (that of the authors' release 1.2, which later releases changed) is part of the numbers. The
authors tile only on request, as when they train on latents; here it is on, and `tile_frames=None, tile_size=None`
turns it off.
Checked against the authors' modules: tests/golden, tests/cvvae/test_od_vae.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.causal_conv import CausalConv3d
from cvvae.layers import (
    ConvFactory,
    FrameConv2d,
    NamedSequence,
    NormSilu,
    Resample,
    ResBlock,
    RightBottomConv3d,
    attention,
    batch_to_frames,
    frames_to_batch,
)
from cvvae.spec import VAESpec
from cvvae.tiling import SpatialTiling
from cvvae.vae import VideoVAE

NamedBlocks = Iterator[tuple[str, nn.Module]]

NORM_GROUPS = 32
_EPS = 1e-6
_NUM_LEVELS = 4
_FRAME_LEVELS = (0, 1)
"""Encoder levels whose blocks are 2-D."""
_LEVELS_THAT_HALVE_TIME = (1, 2)


@dataclass(frozen=True, slots=True, kw_only=True)
class ODVAESpec(VAESpec):
    """An OD-VAE. Temporal tiles share one frame; a whole one has tile_frames + 1 frames, 33."""

    widths: tuple[int, ...]
    """Channels of each of the four levels, finest first."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    tile_frames: int | None = 32
    decode_tile_frames: int | None = 15
    """Latent frames from one temporal tile to the next when decoding: a whole one has 16, not the encoder's 9."""
    tile_size: int | None = 256
    tile_overlap: float = 0.125

    def __post_init__(self) -> None:
        VAESpec.__post_init__(self)
        self._require_positive("num_res_blocks")
        if (self.time_stride, self.space_stride) != (4, 8):
            raise ValueError(
                f"VAESpec {self.name!r}: time_stride, space_stride: expected 4, 8, "
                f"got {self.time_stride}, {self.space_stride}"
            )
        if len(self.widths) != _NUM_LEVELS or any(width < 1 or width % NORM_GROUPS for width in self.widths):
            raise ValueError(
                f"VAESpec {self.name!r}: widths: expected {_NUM_LEVELS} positive multiples of {NORM_GROUPS}, "
                f"got {self.widths}"
            )
        if (self.tile_frames is None) != (self.decode_tile_frames is None):
            raise ValueError(
                f"VAESpec {self.name!r}: decode_tile_frames: expected None with tile_frames=None and only then, "
                f"got {self.decode_tile_frames} with {self.tile_frames}"
            )
        if self.decode_tile_frames is not None:
            self._require_positive("decode_tile_frames")

    @property
    def latent_tile_frames(self) -> int | None:
        return self.decode_tile_frames

    @property
    def encode_tiling(self) -> SpatialTiling | None:
        if self.tile_size is None:
            return None
        latent = self.tile_size // self.space_stride
        return self._tiling(self.tile_size, latent, latent_stride=None)

    @property
    def decode_tiling(self) -> SpatialTiling | None:
        if self.tile_size is None:
            return None
        latent = self.tile_size // self.space_stride
        return self._tiling(latent, self.tile_size, latent_stride=int(latent * (1 - self.tile_overlap)))

    def _tiling(self, tile: int, out_tile: int, *, latent_stride: int | None) -> SpatialTiling:
        """The authors' roundings are downwards. ValueError if they do not line up."""
        stride = int(tile * (1 - self.tile_overlap))
        out_overlap = int(out_tile * self.tile_overlap)
        out_stride = out_tile - out_overlap
        pixels, latents = (stride, out_stride) if latent_stride is None else (out_stride, stride)
        scale = self.space_stride
        if max(tile, out_tile) % scale or latents < 1 or pixels != scale * latents:
            raise ValueError(
                f"VAESpec {self.name!r}: tile_size={self.tile_size} with tile_overlap={self.tile_overlap}: expected "
                f"pixel stride = {scale} * latent stride, got {pixels} and {latents} after rounding, so tiles would "
                "not line up; 64, 256 and 512 do with overlap 0.125 or 0.25"
            )
        return SpatialTiling(tile, stride, out_overlap, out_stride, past_edge=True)

    def encode_tiling_of(self, num_frames: int, height: int, width: int) -> SpatialTiling | None:
        """A video longer than a temporal tile is cut in space even where a spatial tile would hold it."""
        longest, tiling = self.longest_tile, self.encode_tiling
        if tiling is not None and longest is not None and num_frames > longest:
            return tiling
        return VAESpec.encode_tiling_of(self, num_frames, height, width)

    def decode_tiling_of(self, num_latent_frames: int, height: int, width: int) -> SpatialTiling | None:
        step, tiling = self.decode_tile_frames, self.decode_tiling
        if tiling is not None and step is not None and num_latent_frames > step + 1:
            return tiling
        return VAESpec.decode_tiling_of(self, num_latent_frames, height, width)


_OD_VAE = ODVAESpec(
    name="od-vae",
    family="od-vae",
    latent_channels=4,
    widths=(128, 256, 512, 512),
    scaling_factor=0.18215,  # in no config: the authors' code has it, and Stable Diffusion's space
    shift_factor=0.0,
)

ODVAE_SPECS: dict[str, ODVAESpec] = {
    spec.name: spec for spec in (_OD_VAE, replace(_OD_VAE, name="od-vae-tiny", widths=(32, 64, 128, 128)))
}


class ODVAE(VideoVAE):
    """OD-VAE; see `VideoVAE` for its interface. Where the authors' wrapper samples, the latent here is the mean."""

    def __init__(self, spec: ODVAESpec) -> None:
        super().__init__(spec)
        z = spec.latent_channels
        self.encoder = NamedSequence(_encoder_blocks(spec))
        self.quant_conv = _conv1(2 * z, 2 * z)
        self.post_quant_conv = _conv1(z, z)
        self.decoder = NamedSequence(_decoder_blocks(spec))

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(tile_BCTHW.contiguous(memory_format=self.memory_format)))

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        latent_BCTHW = latent_BCTHW.contiguous(memory_format=self.memory_format)
        return self.decoder(self.post_quant_conv(latent_BCTHW))


_conv3: ConvFactory = partial(CausalConv3d, before="first frame")
_conv1: ConvFactory = partial(CausalConv3d, kernel=(1, 1, 1), before="first frame")


class FrameResBlock(ResBlock):
    """A residual block of every frame by itself: its norms see one frame, unlike those of the 3-D blocks."""

    def forward(self, x: Tensor) -> Tensor:
        return batch_to_frames(super().forward(frames_to_batch(x)), num_clips=x.shape[0])


class FrameDownsample(FrameConv2d):
    """Halves H and W of every frame; pads zeros right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class SmoothUpsample(Resample):
    """Doubles H and W, and time as t -> 2t - 1, by trilinear interpolation; then its convolution.

    The first frame is interpolated in space only, and the others without looking at it.
    """

    def forward(self, x: Tensor) -> Tensor:
        interpolate = partial(F.interpolate, mode="trilinear", align_corners=False)
        first = interpolate(x[:, :, :1], scale_factor=(1.0, 2.0, 2.0))
        if x.shape[2] == 1:
            return super().forward(first)
        rest = interpolate(x[:, :, 1:], scale_factor=(2.0, 2.0, 2.0))
        return super().forward(torch.cat([first, rest], dim=2))


class RepeatUpsample(Resample):
    """Doubles H and W by repeating pixels, then its convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


class ClipNormAttention(nn.Module):
    """Single-head attention over the positions of each frame, plus a residual; the norm is over the whole clip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, _EPS)
        self.q = _conv1(channels, channels)
        self.k = _conv1(channels, channels)
        self.v = _conv1(channels, channels)
        self.proj_out = _conv1(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        h = self.norm(x)
        query, key, value = (frames_to_batch(project(h)).flatten(2).mT for project in (self.q, self.k, self.v))
        attended = attention(query, key, value).mT.unflatten(2, (height, width))
        return x + self.proj_out(batch_to_frames(attended, num_clips=x.shape[0]))


_res_block = partial(
    ResBlock, conv1=_conv3, conv2=_conv3, shortcut=("nin_shortcut", _conv1), groups=NORM_GROUPS, eps=_EPS
)
_frame_conv3: ConvFactory = partial(nn.Conv2d, kernel_size=3, padding=1)
_frame_res_block = partial(
    FrameResBlock,
    conv1=_frame_conv3,
    conv2=_frame_conv3,
    shortcut=("nin_shortcut", partial(nn.Conv2d, kernel_size=1)),
    groups=NORM_GROUPS,
    eps=_EPS,
)


def _mid_blocks(width: int) -> NamedBlocks:
    yield "mid.block_1", _res_block(width, width)
    yield "mid.attn_1", ClipNormAttention(width)
    yield "mid.block_2", _res_block(width, width)


def _encoder_blocks(spec: ODVAESpec) -> NamedBlocks:
    width = spec.widths[0]
    yield "conv_in", FrameConv2d(spec.in_channels, width, 3, padding=1)
    for level, level_width in enumerate(spec.widths):
        res_block = _frame_res_block if level in _FRAME_LEVELS else _res_block
        for block in range(spec.num_res_blocks):
            yield f"down.{level}.block.{block}", res_block(width, level_width)
            width = level_width
        if level in _LEVELS_THAT_HALVE_TIME:
            halve = Resample(RightBottomConv3d(width, width, stride=(2, 2, 2)))
            yield f"down.{level}.downsample", Resample(halve)  # the key has `conv` twice
        elif level < _NUM_LEVELS - 1:
            yield f"down.{level}.downsample", Resample(FrameDownsample(width))
    yield from _mid_blocks(width)
    yield "norm_out", NormSilu(NORM_GROUPS, width, _EPS)
    yield "conv_out", _conv3(width, 2 * spec.latent_channels)


def _decoder_blocks(spec: ODVAESpec) -> NamedBlocks:
    width = spec.widths[-1]
    yield "conv_in", _conv3(spec.latent_channels, width)
    yield from _mid_blocks(width)
    for level in reversed(range(_NUM_LEVELS)):
        for block in range(spec.num_res_blocks + 1):
            yield f"up.{level}.block.{block}", _res_block(width, spec.widths[level])
            width = spec.widths[level]
        if level - 1 in _LEVELS_THAT_HALVE_TIME:
            yield f"up.{level}.upsample", SmoothUpsample(_conv3(width, width))
        elif level > 0:
            flat = CausalConv3d(width, width, kernel=(1, 3, 3), before="first frame")
            yield f"up.{level}.upsample", RepeatUpsample(flat)
    yield "norm_out", NormSilu(NORM_GROUPS, width, _EPS)
    yield "conv_out", _conv3(width, spec.in_channels)
