"""CV-VAE (arXiv 2405.20279): a video VAE whose latents live in the space of an image VAE.

One network, released in two layouts that differ in key names, padding and epsilon:
- "cvvae-sd21": z = 4, SD1.5/SD2.1's latent space, LDM key names, zero padding, temporal attention in the decoder;
- "cvvae-sd3": z = 16, SD3's latent space, diffusers key names, replicate padding, spatial attention only.
`LAYOUTS` holds every difference; the encoder and decoder below are read top to bottom and are the same for both.
Checked against the authors' modules: tests/golden, tests/cvvae/test_cvvae_golden.py.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from cvvae.fast_conv import FastConv3d
from cvvae.layers import (
    AttentionNames,
    ConvFactory,
    EdgeConv3d,
    FrameConv2d,
    NamedSequence,
    NormSilu,
    Resample,
    ResBlock,
    RightBottomConv3d,
    SpacePadding,
    SpatialAttention,
    SpatioTemporalAttention,
    Upsample,
)
from cvvae.spec import VAESpec
from cvvae.vae import VideoVAE

NamedBlocks = Iterator[tuple[str, nn.Module]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CVVAESpec(VAESpec):
    """A CV-VAE: an image VAE's architecture with time."""

    widths: tuple[int, ...]
    """Channels of each level, finest first."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    norm_groups: int = 32
    half_3d: bool = True
    """The second convolution of each residual block is 2-D ("2D+3D"), not 3-D."""
    tile_frames: int | None = 16
    tile_size: int | None = 576

    def __post_init__(self) -> None:
        VAESpec.__post_init__(self)
        self._require_positive("num_res_blocks", "norm_groups")
        if not self.widths or any(width < 1 or width % self.norm_groups for width in self.widths):
            raise ValueError(
                f"VAESpec {self.name!r}: widths: expected positive multiples of norm_groups={self.norm_groups}, "
                f"got {self.widths}"
            )


# SD1.5 and SD2.1 share one latent space and its scale.
_SD21 = CVVAESpec(
    name="cvvae-sd21",
    family="cvvae-sd21",
    latent_channels=4,
    widths=(128, 256, 512, 512),
    scaling_factor=0.18215,
    shift_factor=0.0,
)
# The released SD3 config states no scale and shift; these are SD3's own.
_SD3 = replace(
    _SD21,
    name="cvvae-sd3",
    family="cvvae-sd3",
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)
_TINY_WIDTHS = (32, 64, 128, 128)
_TIME_STRIDES = (2, 8)
"""Other temporal compressions than the released models' 4. Nobody published weights of those."""

CVVAE_SPECS: dict[str, CVVAESpec] = {
    spec.name: spec
    for spec in (
        _SD21,
        replace(_SD21, name="cvvae-sd21-full3d", half_3d=False),
        _SD3,
        *(replace(_SD21, name=f"cvvae-sd21-t{stride}", time_stride=stride) for stride in _TIME_STRIDES),
        *(
            replace(_SD21, name=f"cvvae-sd21-t{stride}-tiny", time_stride=stride, widths=_TINY_WIDTHS)
            for stride in _TIME_STRIDES
        ),
        replace(_SD21, name="cvvae-sd21-tiny", widths=_TINY_WIDTHS),
        replace(_SD21, name="cvvae-sd21-full3d-tiny", half_3d=False, widths=_TINY_WIDTHS),
        replace(_SD3, name="cvvae-sd3-tiny", widths=_TINY_WIDTHS),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What differs between the released checkpoints. Names are formatted with {level} and {block}."""

    norm_eps: float
    space: SpacePadding
    down: str
    downsample: str
    up: str
    upsample: str
    mid: tuple[str, str, str]
    norm_out: str
    shortcut: str
    shortcut_conv: ConvFactory
    attention: AttentionNames
    decoder_attention: type[SpatialAttention]
    up_counts_from_finest: bool
    """LDM numbers the decoder's levels from the finest, diffusers in the order they run."""
    downsample_conv: Callable[..., nn.Module]


LAYOUTS: dict[str, Layout] = {
    "cvvae-sd21": Layout(
        norm_eps=1e-5,  # not LDM's 1e-6
        space="zeros",
        down="down.{level}.block.{block}",
        downsample="down.{level}.downsample",
        up="up.{level}.block.{block}",
        upsample="up.{level}.upsample",
        mid=("mid.block_1", "mid.attn_1", "mid.block_2"),
        norm_out="norm_out",
        shortcut="nin_shortcut",
        shortcut_conv=partial(FastConv3d, kernel_size=1),
        attention=AttentionNames("norm", "q", "k", "v", "proj_out", as_conv=True),
        decoder_attention=SpatioTemporalAttention,
        up_counts_from_finest=True,
        downsample_conv=RightBottomConv3d,
    ),
    "cvvae-sd3": Layout(
        norm_eps=1e-6,
        space="replicate",
        down="down_blocks.{level}.resnets.{block}",
        downsample="down_blocks.{level}.downsamplers.0",
        up="up_blocks.{level}.resnets.{block}",
        upsample="up_blocks.{level}.upsamplers.0",
        mid=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
        norm_out="conv_norm_out",
        shortcut="conv_shortcut",
        shortcut_conv=partial(FrameConv2d, kernel_size=1),
        attention=AttentionNames("group_norm", "to_q", "to_k", "to_v", "to_out.0", as_conv=False),
        decoder_attention=SpatialAttention,
        up_counts_from_finest=False,
        downsample_conv=partial(EdgeConv3d, frames_before=2, frames_after=0, space="replicate"),
    ),
}


class CVVAE(VideoVAE):
    """CV-VAE in either layout; see `VideoVAE` for its interface.

    Its group norm pools over the frames of a tile, so tiles of another length give other latents: the authors' tile
    plan is part of the numbers.
    """

    def __init__(self, spec: CVVAESpec) -> None:
        super().__init__(spec)
        halves_time = levels_that_halve_time(spec)
        layout = LAYOUTS[spec.family]
        self.encoder = NamedSequence(_encoder_blocks(spec, layout, halves_time))
        self.decoder = NamedSequence(_decoder_blocks(spec, layout, halves_time))

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return self.encoder(tile_BCTHW.contiguous(memory_format=self.memory_format))

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return self.decoder(latent_BCTHW.contiguous(memory_format=self.memory_format))


def levels_that_halve_time(spec: CVVAESpec) -> tuple[bool, ...]:
    """For each downsampler, finest first, whether it halves time too. ValueError if the strides cannot be built.

    The authors' rule for stride 4 is every other level from the finest. Smaller strides take the first of those,
    larger ones go on with the levels in between. The decoder mirrors it.
    """
    if spec.family not in LAYOUTS:
        raise ValueError(f"VAESpec {spec.name!r}: family: expected one of {sorted(LAYOUTS)}, got {spec.family!r}")
    num_samplers = len(spec.widths) - 1
    if spec.space_stride != 2**num_samplers:
        raise ValueError(
            f"VAESpec {spec.name!r}: space_stride: expected {2**num_samplers} for {len(spec.widths)} widths, "
            f"got {spec.space_stride}"
        )
    possible = [2**halvings for halvings in range(num_samplers + 1)]
    if spec.time_stride not in possible:
        raise ValueError(f"VAESpec {spec.name!r}: time_stride: expected one of {possible}, got {spec.time_stride}")
    preferred = sorted(range(num_samplers), key=lambda level: (level % 2, level))
    halving = preferred[: possible.index(spec.time_stride)]
    return tuple(level in halving for level in range(num_samplers))


def _res_block(spec: CVVAESpec, layout: Layout, conv: ConvFactory) -> ConvFactory:
    return partial(
        ResBlock,
        conv1=conv,
        conv2=partial(FrameConv2d, kernel_size=3, padding=1) if spec.half_3d else conv,
        shortcut=(layout.shortcut, layout.shortcut_conv),
        groups=spec.norm_groups,
        eps=layout.norm_eps,
    )


def _mid_blocks(
    spec: CVVAESpec, layout: Layout, res_block: ConvFactory, attention: type[SpatialAttention]
) -> NamedBlocks:
    width = spec.widths[-1]
    first, middle, last = layout.mid
    yield first, res_block(width, width)
    yield middle, attention(width, names=layout.attention, groups=spec.norm_groups, eps=layout.norm_eps)
    yield last, res_block(width, width)


def _encoder_blocks(spec: CVVAESpec, layout: Layout, halves_time: tuple[bool, ...]) -> NamedBlocks:
    conv = partial(EdgeConv3d, frames_before=2, frames_after=0, space=layout.space)
    res_block = _res_block(spec, layout, conv)
    width = spec.widths[0]
    yield "conv_in", conv(spec.in_channels, width)
    for level, level_width in enumerate(spec.widths):
        for block in range(spec.num_res_blocks):
            yield layout.down.format(level=level, block=block), res_block(width, level_width)
            width = level_width
        if level < len(halves_time):
            stride = (2 if halves_time[level] else 1, 2, 2)
            yield (
                layout.downsample.format(level=level),
                Resample(layout.downsample_conv(width, width, stride=stride)),
            )
    yield from _mid_blocks(spec, layout, res_block, SpatialAttention)
    yield layout.norm_out, NormSilu(spec.norm_groups, width, layout.norm_eps)
    yield "conv_out", conv(width, 2 * spec.latent_channels)


def _decoder_blocks(spec: CVVAESpec, layout: Layout, halves_time: tuple[bool, ...]) -> NamedBlocks:
    # not causal. SD3 repeats the edge in time as in space; z = 4 pads zeros, except after upsampling
    edge_conv = partial(EdgeConv3d, frames_before=1, frames_after=1, space=layout.space)
    conv: ConvFactory = edge_conv
    if layout.space == "zeros":
        conv = partial(FastConv3d, kernel_size=3, padding=1)
    res_block = _res_block(spec, layout, conv)
    width = spec.widths[-1]
    yield "conv_in", conv(spec.latent_channels, width)
    yield from _mid_blocks(spec, layout, res_block, layout.decoder_attention)
    for level in reversed(range(len(spec.widths))):
        number = level if layout.up_counts_from_finest else len(spec.widths) - 1 - level
        for block in range(spec.num_res_blocks + 1):
            yield layout.up.format(level=number, block=block), res_block(width, spec.widths[level])
            width = spec.widths[level]
        if level > 0:
            doubling = 2 if halves_time[level - 1] else 1
            yield layout.upsample.format(level=number), Upsample(edge_conv(width, doubling * width))
    yield layout.norm_out, NormSilu(spec.norm_groups, width, layout.norm_eps)
    yield "conv_out", conv(width, spec.in_channels)
