"""Which `OpenSoraSpec` a checkpoint is: mostly from its tensors, for the authors' config.json has no widths.

The checkpoint also holds the shift and scale of the latents, as buffers that win over the config. Here they are the
spec's: taken from the file on loading, written back on saving, and in between no tensor that a dtype could round.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cvvae.config_fields import named, read_back, written
from cvvae.open_sora_vae import OPEN_SORA_SPECS, OpenSoraSpec

CLASS_NAME = "VideoAutoencoderPipeline"
WEIGHTS_NAME = "model.safetensors"

_STAGES = {"vae_2d": "VideoAutoencoderKL", "vae_temporal": "VAE_Temporal_SD"}
_OWN = ("latent_channels", "scaling_factor", "shift_factor", "tile_frames")
_BASE = OPEN_SORA_SPECS["open-sora-1.2"]
_FIRST_KEYS = (
    "spatial_vae.module.encoder.down_blocks.0.resnets.0.conv1.weight",
    "temporal_vae.encoder.block_res_blocks.0.0.conv1.conv.weight",
)


def spec_from_config(config: Mapping[str, Any], *, where: str) -> OpenSoraSpec:
    """What config.json says, sizes still the release's: `spec_with_tensors` puts them right.

    Its micro_frame_size, scale and shift are not read: the authors' loader overrides the first by 17, and the others
    lose to the checkpoint's. ValueError if a stage is of another class.
    """
    for field, expected in _STAGES.items():
        stage = config.get(field, {})
        kind = stage.get("type", expected) if isinstance(stage, Mapping) else stage
        if kind != expected:
            raise ValueError(f"{where}: {field}: expected type {expected!r}, got {kind!r}")
    try:
        return replace(_BASE, **read_back(config, _BASE, _OWN, where=where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def config_from_spec(spec: OpenSoraSpec) -> dict[str, Any]:
    """A config.json with the authors' fields, keys sorted; what they lack is beside them under the spec's names."""
    config = {
        "architectures": [CLASS_NAME],
        "model_type": CLASS_NAME,
        "cal_loss": False,
        "freeze_vae_2d": False,
        "from_pretrained": None,
        "micro_frame_size": spec.tile_frames,
        "scale": [1 / factor for factor in _per_channel(spec.scaling_factor, spec)],
        "shift": _per_channel(spec.shift_factor, spec),
        "vae_2d": {"type": _STAGES["vae_2d"], "from_pretrained": None, "micro_batch_size": 4},
        "vae_temporal": {"type": _STAGES["vae_temporal"], "from_pretrained": None},
        **written(spec, _BASE, _OWN),
    }
    return dict(sorted(config.items()))


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of the two stages."""
    return all(key in tensors for key in _FIRST_KEYS)


def spec_from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> OpenSoraSpec:
    """The spec whose keys these are, with micro clips of 17 frames. ValueError if it cannot be told."""
    return spec_with_tensors(_BASE, tensors, where=where)


def spec_with_tensors(spec: OpenSoraSpec, tensors: Mapping[str, Tensor], *, where: str) -> OpenSoraSpec:
    """`spec` with the sizes, shift and scale of the checkpoint. ValueError naming a key without which they lack."""

    def tensor(key: str) -> Tensor:
        if key not in tensors:
            raise ValueError(f"{where}: missing key {key!r}, without which the model cannot be recognised")
        return tensors[key]

    def widths(pattern: str) -> tuple[int, ...]:
        found: list[int] = []
        while (key := pattern.format(level=len(found))) in tensors:
            found.append(tensors[key].shape[0])
        return tuple(found)

    scale, shift = tensor("scale"), tensor("shift")
    try:
        sized = replace(
            spec,
            in_channels=tensor("spatial_vae.module.encoder.conv_in.weight").shape[1],
            latent_channels=tensor("temporal_vae.post_quant_conv.conv.weight").shape[0],
            widths=widths("spatial_vae.module.encoder.down_blocks.{level}.resnets.0.norm2.weight"),
            temporal_widths=widths("temporal_vae.encoder.block_res_blocks.{level}.0.norm2.weight"),
            scaling_factor=_scale_in_file(scale, spec),
            shift_factor=_shift_in_file(shift, spec),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return named(sized, OPEN_SORA_SPECS.values())


def constants(spec: OpenSoraSpec) -> dict[str, Tensor]:
    """What the checkpoint holds beside weights: latents are normalised as (z - shift) / scale, (1, C, 1, 1, 1)."""
    scale = [1 / factor for factor in _per_channel(spec.scaling_factor, spec)]
    return {
        name: torch.tensor(values, dtype=torch.float32).view(1, -1, 1, 1, 1)
        for name, values in (("scale", scale), ("shift", _per_channel(spec.shift_factor, spec)))
    }


def _shift_in_file(shift: Tensor, spec: OpenSoraSpec) -> float | tuple[float, ...]:
    """The spec's shift if the file's is a rounding of it, else the file's."""
    if torch.equal(constants(spec)["shift"].to(shift.dtype), shift):
        return spec.shift_factor
    return tuple(float(value) for value in shift.flatten())


def _scale_in_file(scale: Tensor, spec: OpenSoraSpec) -> float | tuple[float, ...]:
    if torch.equal(constants(spec)["scale"].to(scale.dtype), scale):
        return spec.scaling_factor
    if not scale.all():
        raise ValueError("scale: expected numbers other than 0 in the checkpoint, got 0")
    return tuple(1 / float(value) for value in scale.flatten())


def _per_channel(value: float | tuple[float, ...], spec: OpenSoraSpec) -> list[float]:
    return list(value) if isinstance(value, tuple) else [value] * spec.latent_channels
