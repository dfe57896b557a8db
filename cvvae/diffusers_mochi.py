"""Mochi 1's VAE (AutoencoderKLMochi): 6x8x8, z = 12, in one pass. The worked example of docs/adding-a-vae.md.

Convolutions and attention are causal and norms see one frame, so a video's first frames give its first latents. The
class cannot encode in chunks, so it does not stream. Pixels get Fourier features first, hence 15 input channels of
the network for 3 of the video. T = 1 + 6k; the decoder makes 6 frames of each latent, and the first 5 are dropped.
Encoding needs float32; in bfloat16 latents were off by three quarters of their size, in float16 by an eighth.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry

_MEAN = (
    *(-0.06730895953510081, -0.038011381506090416, -0.07477820912866141, -0.05565264470995561),
    *(0.012767231469026969, -0.04703542746246419, 0.043896967884726704, -0.09346305707025976),
    *(-0.09918314763016893, -0.008729793427399178, -0.011931556316503654, -0.0321993391887285),
)
_STD = (
    *(0.9263795028493863, 0.9248894543193766, 0.9393059390890617, 0.959253732819592),
    *(0.8244560132752793, 0.917259975397747, 0.9294154431013696, 1.3720942357788521),
    *(0.881393668867029, 0.9168315692124348, 0.9185249279345552, 0.9274757570805041),
)


def _geometry(arguments: Arguments) -> Geometry:
    return Geometry(
        arguments["latent_channels"],
        math.prod(arguments["temporal_expansions"]),
        math.prod(arguments["spatial_expansions"]),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MochiSpec(DiffusersSpec):
    """A Mochi VAE. Normalised latents are (z - mean) * scaling_factor / std in diffusers' words."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLMochi",
        arguments={
            "act_fn": "silu",
            "add_attention_block": (False, True, True, True, True),
            "decoder_block_out_channels": (128, 256, 512, 768),
            "encoder_block_out_channels": (64, 128, 256, 384),
            "in_channels": 15,
            "latent_channels": 12,
            "layers_per_block": (3, 3, 4, 6, 3),
            "out_channels": 3,
            "spatial_expansions": (2, 2, 2),
            "temporal_expansions": (1, 2, 3),
        },
        fixed={"in_channels": 15, "out_channels": 3},
        geometry=_geometry,
        normalised_by=("latents_mean", "latents_std", "scaling_factor"),
    )

    @property
    def prefix_exact(self) -> bool:
        return True


def _spec(name: str, channels: int, **arguments: Any) -> MochiSpec:
    config = MochiSpec.peer.complete({"latent_channels": channels, **arguments})
    return MochiSpec(
        name=name,
        family="mochi",
        **_geometry(dict(config))._asdict(),
        scaling_factor=tuple(1 / deviation for deviation in _STD[:channels]),
        shift_factor=_MEAN[:channels],
        config=config,
    )


MOCHI_SPECS: dict[str, MochiSpec] = {
    spec.name: spec
    for spec in (
        _spec("mochi", 12),
        _spec(
            "mochi-tiny",
            4,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        ),
    )
}


class MochiVAE(DiffusersVAE):
    """Mochi's VAE; see `VideoVAE`."""

    spec: MochiSpec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        if tile_BCTHW.dtype != torch.float32:
            # the features are sines of up to 800 times a pixel: rounded to half precision, a pixel is another phase
            raise ValueError(
                f"tile_BCTHW: expected float32 to encode with spec {self.spec.name!r}, got {tile_BCTHW.dtype}: its "
                "Fourier features of rounded pixels are noise"
            )
        moments_BCTHW, _ = self.encoder(self._arranged(tile_BCTHW))
        return moments_BCTHW

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        video_BCTHW, _ = self.decoder(self._arranged(latent_BCTHW))
        return video_BCTHW[:, :, self.spec.time_stride - 1 :]
