"""Image VAEs of diffusers on videos: AutoencoderKL frame by frame, and SVD's, whose decoder sees all frames.

AutoencoderKL is Stable Diffusion's (z = 4), SDXL's, SD3's and FLUX's (z = 16, without the 1x1 convolutions). Neither
compresses time: any length is valid, and latent t stands for frame t.
SVD ("Stable Video Diffusion", arXiv 2311.15127) encodes each frame on its own too; its decoder mixes frames in time.
In float16 SDXL's encoder overflows (diffusers upcasts it): take float32 or bfloat16.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry
from cvvae.layers import batch_to_frames, frame_by_frame, frames_to_batch
from cvvae.vae import StreamState

_SIZES = {
    "act_fn": "silu",
    "block_out_channels": (64,),
    "down_block_types": ("DownEncoderBlock2D",),
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 32,
    "out_channels": 3,
    "up_block_types": ("UpDecoderBlock2D",),
}
_DIFFUSERS_ONLY = frozenset({"sample_size", "force_upcast"})


def _geometry(arguments: Arguments) -> Geometry:
    return Geometry(arguments["latent_channels"], 1, 2 ** (len(arguments["block_out_channels"]) - 1))


def _as_many_blocks_as_widths(arguments: Arguments) -> None:
    for name in ("down_block_types", "up_block_types"):
        if len(arguments.get(name, arguments["block_out_channels"])) != len(arguments["block_out_channels"]):
            raise ValueError(
                f"{name}: expected as many as block_out_channels ({len(arguments['block_out_channels'])}), "
                f"got {len(arguments[name])}"
            )


# --- frame by frame -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageKLSpec(DiffusersSpec):
    """An AutoencoderKL. A config with latents_mean and latents_std (Playground) has a scale and shift per channel."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKL",
        arguments={**_SIZES, "mid_block_add_attention": True, "use_post_quant_conv": True, "use_quant_conv": True},
        ignored=_DIFFUSERS_ONLY,
        fixed={"in_channels": 3, "out_channels": 3},
        geometry=_geometry,
        check=_as_many_blocks_as_widths,
        normalised_by=("scaling_factor", "shift_factor", "latents_mean", "latents_std"),
    )

    @property
    def prefix_exact(self) -> bool:
        return self.tile_frames is None and self.tile_size is None


def _image_config(widths: tuple[int, ...], **others: Any) -> dict[str, Any]:
    return {
        "block_out_channels": widths,
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "layers_per_block": 2,
        **others,
    }


_Z16 = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_WIDTHS = (128, 256, 512, 512)
_TINY = {"norm_num_groups": 4, "layers_per_block": 1}

_SD = ImageKLSpec(
    name="sd",
    family="image-kl",
    latent_channels=4,
    time_stride=1,
    space_stride=8,
    scaling_factor=0.18215,
    shift_factor=0.0,
    config=ImageKLSpec.peer.complete(_image_config(_WIDTHS)),
)
_SD3 = replace(
    _SD,
    name="sd3",
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
    config=ImageKLSpec.peer.complete(_image_config(_WIDTHS, **_Z16)),
)

IMAGE_KL_SPECS: dict[str, ImageKLSpec] = {
    spec.name: spec
    for spec in (
        _SD,
        replace(_SD, name="sdxl", scaling_factor=0.13025),
        _SD3,
        replace(_SD3, name="flux", scaling_factor=0.3611, shift_factor=0.1159),
        replace(_SD, name="sd-tiny", config=ImageKLSpec.peer.complete(_image_config((8, 8, 8, 16), **_TINY))),
        replace(
            _SD3,
            name="flux-tiny",
            config=ImageKLSpec.peer.complete(_image_config((8, 8, 8, 16), **{**_Z16, **_TINY})),
        ),
    )
}
"""`sd` is the VAE of Stable Diffusion 1.x and 2.x."""


class ImageKLVAE(DiffusersVAE):
    """AutoencoderKL on each frame; see `VideoVAE`. A stream has no state."""

    spec: ImageKLSpec

    @property
    def streams(self) -> bool:
        return self.spec.tile_frames is None and self.spec.tile_size is None

    def encode_chunk(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._check_chunk(chunk_BCTHW, state)
        return self._encode_moments(chunk_BCTHW), ()

    def decode_chunk(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._require_streaming()
        self._check_tensor(latent_BCTHW, name="latent_BCTHW", channels=self.spec.latent_channels)
        return self._decode_pixels(latent_BCTHW), ()

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return _encode_frames(self, tile_BCTHW)

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        pixels = latent_BCTHW.shape[-2] * latent_BCTHW.shape[-1] * self.spec.space_stride**2
        return frame_by_frame(
            lambda frames: self.decoder(self.post_quant_conv(frames)), self._arranged(latent_BCTHW), pixels=pixels
        )


def _encode_frames(vae: DiffusersVAE, video_BCTHW: Tensor) -> Tensor:
    """Moments (B, 2C, T, h, w), each frame on its own."""
    pixels = video_BCTHW.shape[-2] * video_BCTHW.shape[-1]
    return frame_by_frame(
        lambda frames: vae.quant_conv(vae.encoder(frames)), vae._arranged(video_BCTHW), pixels=pixels
    )


_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def with_new_attention_keys(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the keys of today for attention: Stable Diffusion's own files have those of 2022."""
    renamed: dict[str, Tensor] = {}
    for key, value in tensors.items():
        path, _, kind = key.rpartition(".")
        block, _, layer = path.rpartition(".")
        if ".attentions." in path:
            key = f"{block}.{_OLD_ATTENTION.get(layer, layer)}.{kind}"
            # linear layers, which LDM and a few others store as 1x1 convolutions
            value = value.flatten(1) if value.ndim == 4 else value
        renamed[key] = value
    return renamed


# --- SVD ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SVDSpec(DiffusersSpec):
    """An AutoencoderKLTemporalDecoder. Its widths are multiples of 32: the class fixes the groups of its norms."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLTemporalDecoder",
        arguments={
            name: default
            for name, default in _SIZES.items()
            if name not in ("act_fn", "norm_num_groups", "up_block_types")
        },
        ignored=_DIFFUSERS_ONLY,
        fixed={"in_channels": 3, "out_channels": 3},
        geometry=_geometry,
        check=_as_many_blocks_as_widths,
    )

    @property
    def prefix_exact(self) -> bool:
        return True


def _svd_config(widths: tuple[int, ...], layers_per_block: int) -> tuple[tuple[str, Any], ...]:
    return SVDSpec.peer.complete(
        {
            "block_out_channels": widths,
            "down_block_types": ("DownEncoderBlock2D",) * len(widths),
            "layers_per_block": layers_per_block,
        }
    )


_SVD = SVDSpec(
    name="svd",
    family="svd",
    latent_channels=4,
    time_stride=1,
    space_stride=8,
    scaling_factor=0.18215,
    shift_factor=0.0,
    config=_svd_config(_WIDTHS, 2),
)

SVD_SPECS: dict[str, SVDSpec] = {
    spec.name: spec for spec in (_SVD, replace(_SVD, name="svd-tiny", config=_svd_config((32, 32, 32, 32), 1)))
}


class SVDVAE(DiffusersVAE):
    """Stable Video Diffusion's VAE; see `VideoVAE`.

    Its decoder has norms and convolutions over all frames, so it does not stream, and decoding part of a video is not
    part of decoding it. (diffusers' pipeline decodes in chunks for memory, which changes pixels at their borders.)
    """

    spec: SVDSpec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return _encode_frames(self, tile_BCTHW)

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        num_clips, _, num_frames = latent_BCTHW.shape[:3]
        frames = frames_to_batch(self._arranged(latent_BCTHW))
        all_video = torch.zeros(num_clips, num_frames, dtype=frames.dtype, device=frames.device)
        pixels = self.decoder(frames, num_frames=num_frames, image_only_indicator=all_video)
        return batch_to_frames(pixels, num_clips=num_clips)
