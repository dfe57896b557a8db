"""LTX-Video's VAE (AutoencoderKLLTXVideo, releases 0.9.0, 0.9.1, 0.9.5 on) and LTX-2's (AutoencoderKLLTX2Video).

8x32x32, z = 128, in one pass. T = 1 + 8k and sides are multiples of 32; LTX-Video's class takes others without a word
and decodes them to another size (80 rows to 96), which is refused here. The encoder is causal and its norms see one
position, so a video's first frames give its first latents; diffusers cannot compute it in chunks, so it does not
stream. It gives one log variance for each position, which here, as there, is repeated for every channel.
Mean and std of the latents are tensors of the checkpoint, so a spec has them only after loading; the named specs have
0 and 1.

The decoder is not causal. From 0.9.1 it is told a noise level (`decode_timestep`), and in 0.9.1 it adds noise of its
own, which here always starts from the same seed: decoding twice gives the same video.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry

S = TypeVar("S", bound="LTXSpec")

_BOTH = {"conv", "spatiotemporal"}
"""Kinds of resampling that change time and space; `spatial` and `temporal` are the others."""
_PLAIN_BLOCK = "LTXVideoDownBlock3D"


def _strides(scaled: tuple[bool, ...], kinds: tuple[str, ...], patch: int) -> tuple[int, int]:
    """(time, space) strides of the blocks that scale, and of folding pixels into patches."""
    used = [kind for is_scaled, kind in zip(scaled, kinds, strict=False) if is_scaled]
    in_time = sum(kind in _BOTH or kind == "temporal" for kind in used)
    in_space = sum(kind in _BOTH or kind == "spatial" for kind in used)
    return 2**in_time, patch * 2**in_space


def _encoder_kinds(arguments: Arguments) -> tuple[str, ...]:
    """LTX-Video's first blocks ignore `downsample_type` and halve time and space."""
    kinds, blocks = arguments["downsample_type"], arguments["down_block_types"]
    return tuple("conv" if block == _PLAIN_BLOCK else kind for kind, block in zip(kinds, blocks, strict=False))


def _geometry(arguments: Arguments) -> Geometry:
    strides = _strides(arguments["spatio_temporal_scaling"], _encoder_kinds(arguments), arguments["patch_size"])
    return Geometry(arguments["latent_channels"], *strides)


def _check(arguments: Arguments) -> None:
    _, time_stride, space_stride = _geometry(arguments)
    scaled = arguments["decoder_spatio_temporal_scaling"]
    kinds = arguments.get("upsample_type", ("spatiotemporal",) * len(scaled))
    back = _strides(scaled, kinds, arguments["patch_size"])
    if back != (time_stride, space_stride):
        raise ValueError(
            f"decoder_spatio_temporal_scaling: expected the strides of the encoder, {time_stride} in time and "
            f"{space_stride} in space, got {back[0]} and {back[1]}"
        )
    for name, stride in (("temporal_compression_ratio", time_stride), ("spatial_compression_ratio", space_stride)):
        if arguments[name] not in (None, stride):
            raise ValueError(f"{name}: expected {stride}, which the network has, got {arguments[name]}")


_COMMON = {
    "encoder_causal": True,
    "in_channels": 3,
    "latent_channels": 128,
    "out_channels": 3,
    "patch_size": 4,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "spatial_compression_ratio": None,
    "temporal_compression_ratio": None,
    "timestep_conditioning": False,
}
_FIXED = {"in_channels": 3, "out_channels": 3, "patch_size_t": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class LTXSpec(DiffusersSpec):
    """An LTX-Video VAE. Normalised latents are (z - mean) * scaling_factor / std in diffusers' words."""

    decode_timestep: float = 0.0
    """Noise level that the decoder is told, 0 to 1. No noise is added for it: mix that into the latents yourself. 0
    is what diffusers' pipelines take; the authors recommend 0.05 for 0.9.1 and later. Of no use without
    `timestep_conditioning`, and then 0."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLLTXVideo",
        arguments={
            **_COMMON,
            "block_out_channels": (128, 256, 512, 512),
            "decoder_block_out_channels": (128, 256, 512, 512),
            "decoder_causal": False,
            "decoder_inject_noise": (False,) * 5,
            "decoder_layers_per_block": (4, 3, 3, 3, 4),
            "decoder_spatio_temporal_scaling": (True, True, True, False),
            "down_block_types": (_PLAIN_BLOCK,) * 4,
            "downsample_type": ("conv",) * 4,
            "layers_per_block": (4, 3, 3, 3, 4),
            "spatio_temporal_scaling": (True, True, True, False),
            "upsample_factor": (1,) * 4,
            "upsample_residual": (False,) * 4,
        },
        fixed=_FIXED,
        geometry=_geometry,
        check=_check,
        statistics_in_weights=True,
    )

    @property
    def prefix_exact(self) -> bool:
        return bool(self.arguments["encoder_causal"])

    def __post_init__(self) -> None:
        DiffusersSpec.__post_init__(self)
        highest = 1.0 if self.arguments["timestep_conditioning"] else 0.0
        if not 0 <= self.decode_timestep <= highest:
            raise ValueError(
                f"VAESpec {self.name!r}: decode_timestep: expected 0 to {highest:g} with timestep_conditioning="
                f"{self.arguments['timestep_conditioning']}, got {self.decode_timestep}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LTX2Spec(LTXSpec):
    """An LTX-2 video VAE. The class's own compression ratios, wrong unless the config states them, are not used."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLLTX2Video",
        arguments={
            **_COMMON,
            "block_out_channels": (256, 512, 1024, 2048),
            "decoder_block_out_channels": (256, 512, 1024),
            "decoder_causal": True,
            "decoder_inject_noise": (False,) * 4,
            "decoder_layers_per_block": (5, 5, 5, 5),
            "decoder_spatial_padding_mode": "reflect",
            "decoder_spatio_temporal_scaling": (True, True, True),
            "down_block_types": ("LTX2VideoDownBlock3D",) * 4,
            "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
            "encoder_spatial_padding_mode": "zeros",
            "layers_per_block": (4, 6, 6, 2, 2),
            "spatio_temporal_scaling": (True,) * 4,
            "upsample_factor": (2, 2, 2),
            "upsample_residual": (True, True, True),
            "upsample_type": ("spatiotemporal",) * 3,
        },
        fixed=_FIXED,
        geometry=_geometry,
        check=_check,
        statistics_in_weights=True,
    )


def _spec(spec_type: type[S], name: str, family: str, **arguments: Any) -> S:
    config = spec_type.peer.complete(arguments)
    geometry = _geometry(dict(config))
    return spec_type(
        name=name,
        family=family,
        **geometry._asdict(),
        scaling_factor=(1.0,) * geometry.latent_channels,
        shift_factor=(0.0,) * geometry.latent_channels,
        config=config,
    )


_DECODER_091 = {
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_layers_per_block": (5, 6, 7, 8),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "decoder_inject_noise": (True, True, True, False),
    "upsample_residual": (True, True, True),
    "upsample_factor": (2, 2, 2),
    "timestep_conditioning": True,
}
_095 = {
    **_DECODER_091,
    "block_out_channels": (128, 256, 512, 1024, 2048),
    "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
    "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
    "spatio_temporal_scaling": (True,) * 4,
    "layers_per_block": (4, 6, 6, 2, 2),
    "decoder_layers_per_block": (5, 5, 5, 5),
    "decoder_inject_noise": (False,) * 4,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
_TINY = {"latent_channels": 8, "layers_per_block": (1,) * 5, "block_out_channels": (8, 8, 8, 8)}
_TINY_DECODER = {"decoder_layers_per_block": (1,) * 4, "decoder_block_out_channels": (8, 16, 32)}
_TINY_2 = {**_TINY, **_TINY_DECODER, "block_out_channels": (8, 16, 32, 64)}

LTX_SPECS: dict[str, LTXSpec] = {
    spec.name: spec
    for spec in (
        _spec(LTXSpec, "ltx-0.9.0", "ltx-video"),
        _spec(LTXSpec, "ltx-0.9.1", "ltx-video", **_DECODER_091),
        _spec(LTXSpec, "ltx-0.9.5", "ltx-video", **_095),
        _spec(
            LTXSpec,
            "ltx-0.9.0-tiny",
            "ltx-video",
            **{**_TINY, "decoder_layers_per_block": (1,) * 5, "decoder_block_out_channels": (8, 8, 8, 8)},
        ),
        replace(
            _spec(LTXSpec, "ltx-0.9.1-tiny", "ltx-video", **{**_DECODER_091, **_TINY, **_TINY_DECODER}),
            scaling_factor=(2.0, 0.5) * 4,
            shift_factor=(0.25, -0.5) * 4,
            decode_timestep=0.05,
        ),
        _spec(
            LTXSpec,
            "ltx-0.9.5-tiny",
            "ltx-video",
            **{**_095, **_TINY, **_TINY_DECODER, "block_out_channels": (8, 8, 16, 32, 64)},
        ),
    )
}

LTX2_SPECS: dict[str, LTX2Spec] = {
    spec.name: spec
    for spec in (
        _spec(
            LTX2Spec,
            "ltx2",
            "ltx-2",
            decoder_causal=False,
            spatial_compression_ratio=32,
            temporal_compression_ratio=8,
        ),
        _spec(LTX2Spec, "ltx2-tiny", "ltx-2", **{**_TINY_2, "decoder_causal": False}),
    )
}


class LTXVAE(DiffusersVAE):
    """LTX-Video's VAE and LTX-2's; see `VideoVAE`."""

    spec: LTXSpec

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return self.encoder(tile_BCTHW)

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        arguments = self.spec.arguments
        height, width = latent_BCTHW.shape[-2:]
        if arguments.get("decoder_spatial_padding_mode") == "reflect" and min(height, width) < 2:
            raise ValueError(
                f"latent_BCTHW: expected sides of at least 2 for spec {self.spec.name!r}, whose decoder reflects at "
                f"the border, got {height} x {width}"
            )
        level = None
        if arguments["timestep_conditioning"]:
            level = latent_BCTHW.new_full((latent_BCTHW.shape[0],), self.spec.decode_timestep)
        if not any(arguments["decoder_inject_noise"]):
            return self.decoder(latent_BCTHW, level)
        with _noise_from_seed(latent_BCTHW.device):
            return self.decoder(latent_BCTHW, level)


@contextmanager
def _noise_from_seed(device: torch.device) -> Iterator[None]:
    """The device's own random numbers start from a seed inside, and go on outside as if nothing had been."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        devices, generator = [index], torch.cuda.default_generators[index]
    else:
        devices, generator = [], torch.default_generator
    with torch.random.fork_rng(devices=devices):
        generator.manual_seed(0)
        yield
