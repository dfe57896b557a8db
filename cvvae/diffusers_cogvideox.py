"""CogVideoX's VAE (AutoencoderKLCogVideoX): causal convolutions, 4x8x8, z = 16; norms over chunks of 8 frames.

The group norms pool over a chunk, so the chunk length decides numbers: 8 frames, the first chunk with one more, as
the model was trained. Chunks of 16 change latents by a fifth of their range. It is a field of the spec; a chunk is
computed with the two frames that its convolutions saw last, given from chunk to chunk as a value.
T = 1 + 8k. The class also takes 5 or 13 frames, but decodes their latents to 8 or 16; an even T it pools by another
rule. Both are refused. A stream that starts with one frame would be another chunking, and so is none.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry
from cvvae.spec import VAESpec
from cvvae.tiling import Tile, apply_time_tiles

_LEVELS_PER_CHUNK = 8  # chunks of fewer frames are not doubled in time when decoded


def _geometry(arguments: Arguments) -> Geometry:
    return Geometry(
        arguments["latent_channels"],
        arguments["temporal_compression_ratio"],
        2 ** (len(arguments["block_out_channels"]) - 1),
    )


def _check(arguments: Arguments) -> None:
    for name in ("down_block_types", "up_block_types"):
        if len(arguments[name]) != len(arguments["block_out_channels"]):
            raise ValueError(f"{name}: expected as many as block_out_channels, got {len(arguments[name])}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CogVideoXSpec(DiffusersSpec):
    """A CogVideoX VAE. z * scaling_factor is what both generations of the transformer are trained on.

    (`invert_scale_latents` in a config is for pipelines that start from an image: they divide its latent.)
    """

    chunk_frames: int = 8
    """Frames of a chunk after the first, a multiple of 8."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLCogVideoX",
        arguments={
            "act_fn": "silu",
            "block_out_channels": (128, 256, 256, 512),
            "down_block_types": ("CogVideoXDownBlock3D",) * 4,
            "in_channels": 3,
            "latent_channels": 16,
            "layers_per_block": 3,
            "norm_eps": 1e-6,
            "norm_num_groups": 32,
            "out_channels": 3,
            "temporal_compression_ratio": 4,
            "up_block_types": ("CogVideoXUpBlock3D",) * 4,
            "use_post_quant_conv": False,
            "use_quant_conv": False,
        },
        ignored=frozenset({"sample_height", "sample_width", "force_upcast", "invert_scale_latents"}),
        # its 1x1 convolutions would be made for pixel channels, not latent ones: no checkpoint has them
        fixed={
            "in_channels": 3,
            "out_channels": 3,
            "temporal_compression_ratio": 4,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        geometry=_geometry,
        check=_check,
    )

    def __post_init__(self) -> None:
        DiffusersSpec.__post_init__(self)
        if type(self.chunk_frames) is not int or self.chunk_frames < 1 or self.chunk_frames % _LEVELS_PER_CHUNK:
            raise ValueError(
                f"VAESpec {self.name!r}: chunk_frames: expected a positive multiple of {_LEVELS_PER_CHUNK}, "
                f"got {self.chunk_frames}"
            )
        if self.tile_frames is not None and self.tile_frames % self.chunk_frames:
            raise ValueError(
                f"VAESpec {self.name!r}: tile_frames: expected a multiple of chunk_frames={self.chunk_frames} or "
                f"None, got {self.tile_frames}"
            )

    @property
    def frame_unit(self) -> int:
        return self.chunk_frames

    @property
    def latent_chunk_frames(self) -> int:
        """Latent frames of a chunk after the first."""
        return self.chunk_frames // self.time_stride

    def num_video_frames(self, num_latent_frames: int) -> int:
        if num_latent_frames >= 1 and (num_latent_frames - 1) % self.latent_chunk_frames:
            raise ValueError(
                f"latent frames t: expected 1 + {self.latent_chunk_frames}*k for spec {self.name!r}, "
                f"got {num_latent_frames}: others are decoded to frames that nobody encoded"
            )
        return VAESpec.num_video_frames(self, num_latent_frames)


_2B = CogVideoXSpec(
    name="cogvideox-2b",
    family="cogvideox",
    latent_channels=16,
    scaling_factor=1.15258426,
    shift_factor=0.0,
    config=CogVideoXSpec.peer.complete({}),
)
_TINY = {
    "block_out_channels": (8, 8, 8, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}

COGVIDEOX_SPECS: dict[str, CogVideoXSpec] = {
    spec.name: spec
    for spec in (
        _2B,
        replace(_2B, name="cogvideox-5b", scaling_factor=0.7),
        replace(_2B, name="cogvideox-tiny", latent_channels=4, config=CogVideoXSpec.peer.complete(_TINY)),
    )
}


class CogVideoXVAE(DiffusersVAE):
    """CogVideoX's VAE; see `VideoVAE`. Memory beyond input and output is that of a chunk."""

    spec: CogVideoXSpec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        num_frames = tile_BCTHW.shape[2]
        return apply_time_tiles(
            _with_cache(self.encoder),
            self._arranged(tile_BCTHW),
            _chunks(num_frames, self.spec.chunk_frames),
            num_frames_out=self.spec.num_latent_frames(num_frames),
        )

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        num_frames = latent_BCTHW.shape[2]
        return apply_time_tiles(
            _with_cache(self.decoder),
            self._arranged(latent_BCTHW),
            _chunks(num_frames, self.spec.latent_chunk_frames),
            num_frames_out=self.spec.num_video_frames(num_frames),
        )


def _chunks(num_frames: int, chunk: int) -> tuple[Tile, ...]:
    """Chunks that share nothing, the first one frame longer: 1 + 2 * 8 frames are 9 and 8."""
    starts = [0, *range(1 + chunk, num_frames, chunk)]
    return tuple(Tile(start, stop, 0) for start, stop in zip(starts, [*starts[1:], num_frames], strict=True))


def _with_cache(half: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    """Half a network for successive chunks of one video."""
    cache: Any = None

    def next_chunk(chunk_BCTHW: Tensor) -> Tensor:
        nonlocal cache
        out_BCTHW, cache = half(chunk_BCTHW, conv_cache=cache)
        return out_BCTHW

    return next_chunk
