"""HunyuanVideo's VAE and HunyuanVideo 1.5's (AutoencoderKLHunyuanVideo, AutoencoderKLHunyuanVideo15), in one pass.

Both are causal in their convolutions and have attention in which every latent position sees all earlier frames, with
a mask of (t*h*w)^2 numbers: long or large videos need `tile_frames` or `tile_size`, which change the numbers.
1.0: 4x8x8, z = 16; its group norms pool over all frames, so first frames are not independent of later ones. Called
plainly, diffusers does not encode more than 16 frames in one pass, and gives other latents: `window_frames` does so.
1.5: 4x16x16, z = 32; norms see one position, so a video's first frames give its first latents. The class fails on
batches; here clips go through one by one.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry
from cvvae.spec import VAESpec
from cvvae.tiling import Tile


def _geometry(arguments: Arguments) -> Geometry:
    return Geometry(
        arguments["latent_channels"],
        arguments["temporal_compression_ratio"],
        arguments["spatial_compression_ratio"],
    )


_WINDOW, _WINDOW_STRIDE, _WINDOW_DROP = 16, 12, 2
"""Frames of diffusers' windows (and one more), from one to the next, and latents of a later one that are not kept."""
_RGB = {"in_channels": 3, "out_channels": 3}


# --- 1.0 ------------------------------------------------------------------------------------------------------------


def _check(arguments: Arguments) -> None:
    widths = arguments["block_out_channels"]
    for name in ("down_block_types", "up_block_types"):
        if len(arguments[name]) != len(widths):
            raise ValueError(f"{name}: expected as many as block_out_channels ({len(widths)}), got {arguments[name]}")
    if arguments["spatial_compression_ratio"] != 8 or len(widths) != 4:
        raise ValueError(
            f"block_out_channels and spatial_compression_ratio: expected 4 widths and 8, got {widths} and "
            f"{arguments['spatial_compression_ratio']}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HunyuanVideoSpec(DiffusersSpec):
    """A HunyuanVideo VAE: T = 1 + 4k."""

    window_frames: int | None = None
    """None: one pass over all frames, or the tiles of `tile_frames`. 16: what diffusers does unless told otherwise,
    windows of 17 frames, 12 apart. (It speaks of blending two windows; the fade is one latent long and has weight 0
    there, so of each later window the first two latents are dropped.) For encoding; decoding is one pass."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLHunyuanVideo",
        arguments={
            **_RGB,
            "act_fn": "silu",
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
            "latent_channels": 16,
            "layers_per_block": 2,
            "mid_block_add_attention": True,
            "norm_num_groups": 32,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
            "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        },
        fixed={**_RGB, "temporal_compression_ratio": 4},
        geometry=_geometry,
        check=_check,
    )

    def __post_init__(self) -> None:
        DiffusersSpec.__post_init__(self)
        if self.window_frames not in (None, _WINDOW) or (self.window_frames and self.tile_frames):
            raise ValueError(
                f"VAESpec {self.name!r}: window_frames: expected None, or {_WINDOW} with tile_frames=None, "
                f"got {self.window_frames} with {self.tile_frames}"
            )

    @property
    def longest_tile(self) -> int | None:
        return VAESpec.longest_tile.__get__(self) if self.window_frames is None else self.window_frames + 1

    def encode_tiles(self, num_frames: int) -> tuple[Tile, ...]:
        if self.window_frames is None:
            return VAESpec.encode_tiles(self, num_frames)
        starts = [0, *range(_WINDOW_STRIDE, num_frames - (_WINDOW + 1 - _WINDOW_STRIDE), _WINDOW_STRIDE)]
        return tuple(
            Tile(start, min(start + self.window_frames + 1, num_frames), _WINDOW_DROP if start else 0)
            for start in starts
        )


_HUNYUAN = HunyuanVideoSpec(
    name="hunyuan",
    family="hunyuan-video",
    latent_channels=16,
    scaling_factor=0.476986,
    shift_factor=0.0,
    config=HunyuanVideoSpec.peer.complete({}),
)
_TINY: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 16),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
}
_HUNYUAN_TINY = replace(
    _HUNYUAN, name="hunyuan-tiny", latent_channels=4, config=HunyuanVideoSpec.peer.complete(_TINY)
)

HUNYUAN_SPECS: dict[str, HunyuanVideoSpec] = {
    spec.name: spec
    for spec in (
        _HUNYUAN,
        replace(_HUNYUAN, name="hunyuan-windows", window_frames=_WINDOW),
        _HUNYUAN_TINY,
        replace(_HUNYUAN_TINY, name="hunyuan-windows-tiny", window_frames=_WINDOW),
    )
}


class HunyuanVideoVAE(DiffusersVAE):
    """HunyuanVideo's VAE; see `VideoVAE`. A temporal tile is computed in one pass."""

    spec: HunyuanVideoSpec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(self._arranged(tile_BCTHW)))

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(self._arranged(latent_BCTHW)))


# --- 1.5 ------------------------------------------------------------------------------------------------------------


def _check_15(arguments: Arguments) -> None:
    widths, ratio = arguments["block_out_channels"], arguments["spatial_compression_ratio"]
    if ratio != 2 ** (len(widths) - 1):
        raise ValueError(
            f"spatial_compression_ratio: expected {2 ** (len(widths) - 1)} with {len(widths)} block_out_channels, "
            f"got {ratio}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class HunyuanVideo15Spec(DiffusersSpec):
    """A HunyuanVideo 1.5 VAE: T = 1 + 4k."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLHunyuanVideo15",
        arguments={
            **_RGB,
            "block_out_channels": (128, 256, 512, 1024, 1024),
            "downsample_match_channel": True,
            "latent_channels": 32,
            "layers_per_block": 2,
            "spatial_compression_ratio": 16,
            "temporal_compression_ratio": 4,
            "upsample_match_channel": True,
        },
        fixed={**_RGB, "temporal_compression_ratio": 4},
        geometry=_geometry,
        check=_check_15,
    )

    @property
    def prefix_exact(self) -> bool:
        return True


_HUNYUAN_15 = HunyuanVideo15Spec(
    name="hunyuan15",
    family="hunyuan-video-1.5",
    latent_channels=32,
    space_stride=16,
    scaling_factor=1.03682,
    shift_factor=0.0,
    config=HunyuanVideo15Spec.peer.complete({}),
)
_TINY_15: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
}

HUNYUAN_15_SPECS: dict[str, HunyuanVideo15Spec] = {
    spec.name: spec
    for spec in (
        _HUNYUAN_15,
        replace(
            _HUNYUAN_15, name="hunyuan15-tiny", latent_channels=4, config=HunyuanVideo15Spec.peer.complete(_TINY_15)
        ),
    )
}


class HunyuanVideo15VAE(DiffusersVAE):
    """HunyuanVideo 1.5's VAE; see `VideoVAE`. Clips of a batch are computed one after the other."""

    spec: HunyuanVideo15Spec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return torch.cat([self.encoder(clip) for clip in tile_BCTHW.split(1)])

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return torch.cat([self.decoder(clip) for clip in latent_BCTHW.split(1)])
