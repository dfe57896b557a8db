"""Open-Sora 1.2's VAE (OpenSoraVAE_V1_2): an image VAE frame by frame, then a VAE of its latents along time.

4x8x8, z = 4. Time is cut into "micro clips" of 17 frames that are encoded on their own: no shared frame, nothing
carried over, so latents have a seam every 17 frames. In a clip all frames matter to all latents, for the temporal
stage's norms pool over them. Facts and figures: the authors' report 03 and code, branch opensora/v1.2.
Checked against the authors' modules: tests/golden, tests/cvvae/test_open_sora_vae.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.causal_conv import CausalConv3d
from cvvae.image_vae import NORM_GROUPS, ImageVAE
from cvvae.layers import ConvFactory, NamedSequence, NormSilu, ResBlock, frame_by_frame
from cvvae.spec import VAESpec
from cvvae.tiling import Tile
from cvvae.vae import VideoVAE

NamedBlocks = Iterator[tuple[str, nn.Module]]

SPATIAL_SCALE = 0.18215
"""Between the stages. The image VAE's own config says 0.13025; this is what the weights were trained with."""
NUM_RES_BLOCKS = 4
HALVES_TIME = (False, True, True)
"""For each step between two levels of the temporal stage, finest first."""
_EPS = 1e-5  # of the temporal stage; the spatial one has 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSoraSpec(VAESpec):
    """An Open-Sora 1.2 VAE. Normalised latents are (z - shift) / scale in the authors' words.

    `tile_frames` is the length of a micro clip, 1 + 4k; None is one clip whatever the length. Valid videos are whole
    clips and a rest of 0 or 1 + 4k frames: 1, 5, 9, 13, 17, 18, 22, ... 34, ... The authors take any length and ask
    for it again when they decode; here lengths that latents do not tell are refused.
    """

    widths: tuple[int, ...]
    """Channels of each level of the spatial stage, finest first."""
    temporal_widths: tuple[int, ...]
    """Channels of each level of the temporal stage, finest first."""
    tile_frames: int | None = 17

    def __post_init__(self) -> None:
        if self.tile_size is not None:
            raise ValueError(
                f"VAESpec {self.name!r}: tile_size: expected None, the authors do not tile in space; "
                f"got {self.tile_size}"
            )
        VAESpec.__post_init__(self)
        for name in ("widths", "temporal_widths"):
            widths = getattr(self, name)
            if not widths or any(width < 1 or width % NORM_GROUPS for width in widths):
                raise ValueError(
                    f"VAESpec {self.name!r}: {name}: expected positive multiples of {NORM_GROUPS}, got {widths}"
                )
        if len(self.temporal_widths) != len(HALVES_TIME) + 1:
            raise ValueError(
                f"VAESpec {self.name!r}: temporal_widths: expected {len(HALVES_TIME) + 1} of them, "
                f"got {self.temporal_widths}"
            )
        strides = (2 ** sum(HALVES_TIME), 2 ** (len(self.widths) - 1))
        if (self.time_stride, self.space_stride) != strides:
            raise ValueError(
                f"VAESpec {self.name!r}: time_stride, space_stride: expected {strides[0]}, {strides[1]} for "
                f"{len(self.widths)} widths, got {self.time_stride}, {self.space_stride}"
            )

    def _check_tile_frames(self) -> None:
        if self.tile_frames is not None and (self.tile_frames < 1 or (self.tile_frames - 1) % self.time_stride):
            raise ValueError(
                f"VAESpec {self.name!r}: tile_frames: expected 1 + {self.time_stride}*k or None, "
                f"got {self.tile_frames}"
            )

    @property
    def latent_tile_frames(self) -> int | None:
        return None if self.tile_frames is None else 1 + (self.tile_frames - 1) // self.time_stride

    @property
    def longest_tile(self) -> int | None:
        return self.tile_frames

    def encode_tiles(self, num_frames: int) -> tuple[Tile, ...]:
        return _apart(num_frames, self.tile_frames)

    def decode_tiles(self, num_latent_frames: int) -> tuple[Tile, ...]:
        return _apart(num_latent_frames, self.latent_tile_frames)

    @property
    def frames_rule(self) -> str:
        unit = f"1 + {self.time_stride}*k"
        return unit if self.tile_frames is None else f"{self.tile_frames}*n, or {unit} frames more,"

    def is_valid_num_frames(self, num_frames: int) -> bool:
        rest = num_frames if self.tile_frames is None else num_frames % self.tile_frames
        return num_frames >= 1 and (rest == 0 or (rest - 1) % self.time_stride == 0)

    def num_latent_frames(self, num_frames: int) -> int:
        self._check_num_frames(num_frames)
        clips, rest = divmod(num_frames, self.tile_frames or num_frames + 1)
        return clips * (self.latent_tile_frames or 0) + -(-rest // self.time_stride)

    def num_video_frames(self, num_latent_frames: int) -> int:
        if num_latent_frames < 1:
            raise ValueError(f"latent frames t: expected at least 1, got {num_latent_frames}")
        return self.frame_span(num_latent_frames - 1)[1]

    def frame_span(self, latent_frame: int) -> tuple[int, int]:
        clip, within = divmod(latent_frame, self.latent_tile_frames or latent_frame + 1)
        first = clip * (self.tile_frames or 0)
        start, stop = VAESpec.frame_span(self, within)
        return first + start, first + stop


def _apart(length: int, step: int | None) -> tuple[Tile, ...]:
    """Tiles that share nothing."""
    step = step or length
    return tuple(Tile(start, min(start + step, length), 0) for start in range(0, length, step))


_V1_2 = OpenSoraSpec(
    name="open-sora-1.2",
    family="open-sora-1.2",
    latent_channels=4,
    widths=(128, 256, 512, 512),
    temporal_widths=(128, 256, 256, 512),
    scaling_factor=tuple(1 / scale for scale in (3.85, 2.32, 2.33, 3.06)),
    shift_factor=(-0.10, 0.34, 0.27, 0.98),
)

OPEN_SORA_SPECS: dict[str, OpenSoraSpec] = {
    spec.name: spec
    for spec in (
        _V1_2,
        replace(_V1_2, name="open-sora-1.2-tiny", widths=(32, 64, 64, 64), temporal_widths=(32, 64, 64, 128)),
    )
}


class OpenSoraVAE(VideoVAE):
    """Open-Sora 1.2's VAE; see `VideoVAE` for its interface.

    There are two posteriors. What `encode` gives is the second one, of the temporal stage, for the mean of the first:
    `mean` is the latent when both stages take their mean, and `logvar` is the variance of the temporal stage alone,
    without what the spatial posterior would add. (The authors sample both, from global generators.)
    """

    def __init__(self, spec: OpenSoraSpec) -> None:
        super().__init__(spec)
        z = spec.latent_channels
        self.spatial_vae = nn.Module()  # the released keys have `module` in between
        self.spatial_vae.module = ImageVAE(in_channels=spec.in_channels, latent_channels=z, widths=spec.widths)
        self.temporal_vae = TemporalVAE(spec)

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        frames_BCTHW = self.encode_frames(tile_BCTHW)
        return self.temporal_vae.encode(frames_BCTHW.contiguous(memory_format=self.memory_format))

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return self.decode_clip(latent_BCTHW, num_frames=1 + (latent_BCTHW.shape[2] - 1) * self.spec.time_stride)

    def encode_frames(self, video_BCTHW: Tensor) -> Tensor:
        """The spatial stage: scaled means (B, C, T, h, w) of the image VAE, each frame on its own."""
        channels = self.spec.latent_channels
        video_BCTHW = video_BCTHW.contiguous(memory_format=self.memory_format)
        return frame_by_frame(
            lambda frames: SPATIAL_SCALE * self._image_vae.encode(frames)[:, :channels],
            video_BCTHW,
            pixels=video_BCTHW.shape[-2] * video_BCTHW.shape[-1],
        )

    def decode_clip(self, latent_BCTHW: Tensor, *, num_frames: int) -> Tensor:
        """Pixels (B, 3, T, H, W) of one micro clip of T = `num_frames`, of any length.

        `decode` needs no length, since it is given only latents of lengths that tell it. ValueError unless clips of
        `num_frames` have as many latents.
        """
        stride = self.spec.time_stride
        if -(-num_frames // stride) != latent_BCTHW.shape[2]:
            raise ValueError(
                f"latent_BCTHW: expected {-(-num_frames // stride)} latent frames for num_frames={num_frames}, "
                f"got {latent_BCTHW.shape[2]}"
            )
        latent_BCTHW = latent_BCTHW.contiguous(memory_format=self.memory_format)
        frames_BCTHW = self.temporal_vae.decode(latent_BCTHW)[:, :, -num_frames:]
        positions = frames_BCTHW.shape[-2] * frames_BCTHW.shape[-1]
        return frame_by_frame(
            lambda frames: self._image_vae.decode(frames / SPATIAL_SCALE),
            frames_BCTHW,
            pixels=positions * self.spec.space_stride**2,
        )

    @property
    def _image_vae(self) -> ImageVAE:
        image_vae = self.spatial_vae.module
        assert isinstance(image_vae, ImageVAE)
        return image_vae


class TemporalVAE(nn.Module):
    """The second stage: scaled image latents (B, C, T, h, w) <-> moments and latents with a quarter of the frames."""

    def __init__(self, spec: OpenSoraSpec) -> None:
        super().__init__()
        z = spec.latent_channels
        self.time_stride = spec.time_stride
        self.encoder = NamedSequence(_encoder_blocks(z, spec.temporal_widths))
        self.quant_conv = _conv1(2 * z, 2 * z)
        self.post_quant_conv = _conv1(z, z)
        self.decoder = NamedSequence(_decoder_blocks(z, spec.temporal_widths))

    def encode(self, frames_BCTHW: Tensor) -> Tensor:
        """Moments (B, 2C, ceil(T / 4), h, w) of one clip, padded in front with frames of zeros: not black pixels."""
        missing = -frames_BCTHW.shape[2] % self.time_stride
        padded = F.pad(frames_BCTHW, (0, 0, 0, 0, missing, 0))
        return self.quant_conv(self.encoder(padded))

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """(B, C, 4t, h, w): the frames that stand for the padding come first."""
        return self.decoder(self.post_quant_conv(latent_BCTHW))


class DoubleTime(CausalConv3d):
    """A convolution whose output channel 2c + n becomes channel c of frame 2t + n."""

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        split = super().forward(x_BCTHW).movedim(1, -1).unflatten(-1, (-1, 2))
        # (B, T, H, W, C, 2) -> (B, T, 2, H, W, C): the copy of flatten leaves the channels last
        return split.movedim(-1, 2).flatten(1, 2).movedim(-1, 1)


_conv3: ConvFactory = partial(CausalConv3d, before="zeros")
_conv1: ConvFactory = partial(CausalConv3d, kernel=(1, 1, 1), before="zeros")
_conv3_no_bias: ConvFactory = partial(CausalConv3d, before="zeros", bias=False)
_res_block = partial(
    ResBlock,
    conv1=_conv3_no_bias,
    conv2=_conv3_no_bias,
    shortcut=("conv3", partial(CausalConv3d, kernel=(1, 1, 1), before="zeros", bias=False)),
    groups=NORM_GROUPS,
    eps=_EPS,
)


def _res_blocks(path: str, in_channels: int, out_channels: int) -> NamedBlocks:
    for block in range(NUM_RES_BLOCKS):
        yield f"{path}.{block}", _res_block(out_channels if block else in_channels, out_channels)


def _encoder_blocks(latent_channels: int, widths: tuple[int, ...]) -> NamedBlocks:
    width = widths[0]
    yield "conv_in", _conv3_no_bias(latent_channels, width)
    for level, level_width in enumerate(widths):
        yield from _res_blocks(f"block_res_blocks.{level}", width, level_width)
        width = level_width
        if level < len(HALVES_TIME) and HALVES_TIME[level]:
            yield f"conv_blocks.{level}", CausalConv3d(width, width, stride=(2, 1, 1), before="zeros")
    yield from _res_blocks("res_blocks", width, width)
    yield "norm1", NormSilu(NORM_GROUPS, width, _EPS)
    yield "conv2", _conv1(width, 2 * latent_channels)


def _decoder_blocks(latent_channels: int, widths: tuple[int, ...]) -> NamedBlocks:
    width = widths[-1]
    yield "conv1", _conv3(latent_channels, width)
    yield from _res_blocks("res_blocks", width, width)
    for level in reversed(range(len(widths))):
        yield from _res_blocks(f"block_res_blocks.{level}", width, widths[level])
        width = widths[level]
        if level > 0 and HALVES_TIME[level - 1]:
            yield f"conv_blocks.{level - 1}", DoubleTime(width, 2 * width, before="zeros")
    yield "norm1", NormSilu(NORM_GROUPS, width, _EPS)
    yield "conv_out", _conv3(width, latent_channels)
