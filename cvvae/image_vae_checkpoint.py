"""Image VAEs of Stable Diffusion, in and out: LDM's single files, diffusers' AutoencoderKL folders.

The raw latent space is the one between quant_conv and post_quant_conv. SD3 has neither convolution: they are then
the identity, which changes no bit. Nothing is guessed from file names, and no scale from the number of channels:
SD1.5 and SDXL both have four.
"""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from cvvae.diffusers_image_vae import with_new_attention_keys
from cvvae.image_vae import NORM_GROUPS, NUM_RES_BLOCKS, ImageVAE
from cvvae.weights import CONFIG_NAME, check_tensors, file_sha256, read_config, read_tensors

CLASS_NAME = "AutoencoderKL"
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
LDM_PREFIX = "first_stage_model."
"""Before the image VAE's keys in a file that holds a whole diffusion model."""

_ONLY: dict[str, Any] = {
    "act_fn": "silu",
    "layers_per_block": NUM_RES_BLOCKS,
    "mid_block_add_attention": True,
    "latents_mean": None,
    "latents_std": None,
}
"""Config fields that decide numbers, and the values this network has."""
_USUAL_SCALE = 0.18215
"""What an AutoencoderKL config without scaling_factor means: that class's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedImageVAE:
    """An image VAE in eval mode, its weights frozen, and its normalisation: (z - shift_factor) * scaling_factor.

    `weights_sha256` is that of its weight file.
    """

    vae: ImageVAE
    scaling_factor: float
    shift_factor: float
    weights_sha256: str


def load_image_vae(
    path: str | os.PathLike[str],
    *,
    scaling_factor: float | None = None,
    shift_factor: float | None = None,
    device: torch.device | str = "cpu",
) -> LoadedImageVAE:
    """An image VAE in fp32 from a diffusers folder (config.json, one weight file) or an LDM or diffusers file.

    A folder's config has the scale; for a file alone the caller states `scaling_factor` (and `shift_factor`, else 0).
    ValueError if a stated scale is not the config's, or config, keys or shapes are not this network's.
    """
    root = Path(path)
    weight_file = _weight_file(root)
    config_file = root / CONFIG_NAME
    groups = NORM_GROUPS
    if root.is_dir() and config_file.is_file():
        config = read_config(config_file)
        groups = _check_config(config, where=str(config_file))
        scale = _scale_of_config(config, scaling_factor, shift_factor, where=str(config_file))
    elif scaling_factor is None:
        raise ValueError(
            f"{weight_file}: scaling_factor: expected one, since there is no {CONFIG_NAME} that states it (SD1.5 and "
            f"SD2.1 0.18215, SDXL 0.13025, SD3 1.5305 with shift_factor 0.0609), got None"
        )
    else:
        scale = (float(scaling_factor), float(shift_factor or 0.0))
    tensors = _with_quant_convs(_in_diffusers_names(_of_image_vae(read_tensors(weight_file))), where=str(weight_file))
    vae = _image_vae_of(tensors, groups, where=str(weight_file))
    vae.load_state_dict({key: tensor.to(device, torch.float32) for key, tensor in tensors.items()}, assign=True)
    return LoadedImageVAE(
        vae=vae.eval().requires_grad_(False),
        scaling_factor=scale[0],
        shift_factor=scale[1],
        weights_sha256=file_sha256(weight_file),
    )


def save_image_vae(
    vae: ImageVAE, directory: str | os.PathLike[str], *, scaling_factor: float, shift_factor: float = 0.0
) -> Path:
    """Writes config.json and the weights as diffusers' AutoencoderKL has them; `load_image_vae` reads them back.

    The stored dtype is the model's. Each file appears complete or not at all, the config last.
    """
    target = Path(directory)
    num_levels = len(vae.widths)
    config = {
        "_class_name": CLASS_NAME,
        **_ONLY,
        "norm_num_groups": vae.norm_groups,
        "block_out_channels": list(vae.widths),
        "down_block_types": ["DownEncoderBlock2D"] * num_levels,
        "up_block_types": ["UpDecoderBlock2D"] * num_levels,
        "in_channels": vae.in_channels,
        "out_channels": vae.in_channels,
        "latent_channels": vae.latent_channels,
        "scaling_factor": scaling_factor,
        "shift_factor": shift_factor,
        "use_quant_conv": True,
        "use_post_quant_conv": True,
    }
    target.mkdir(parents=True, exist_ok=True)
    weight_part, config_part = target / f".{WEIGHTS_NAME}.tmp", target / f".{CONFIG_NAME}.tmp"
    config_part.write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in vae.state_dict().items()}
    safetensors.torch.save_file(tensors, weight_part, metadata={"format": "pt"})
    weight_part.chmod(config_part.stat().st_mode & 0o777)
    weight_part.replace(target / WEIGHTS_NAME)
    config_part.replace(target / CONFIG_NAME)
    return target


# --- files and configs -------------------------------------------------------------------------------------------


def _weight_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    names = (WEIGHTS_NAME, "diffusion_pytorch_model.bin")
    found = next((path / name for name in names if (path / name).is_file()), None)
    if found is None:
        raise ValueError(f"{path}: expected {' or '.join(names)}, got {sorted(file.name for file in path.iterdir())}")
    return found


def _check_config(config: Mapping[str, Any], *, where: str) -> int:
    """The number of groups of its norms. ValueError if the config is not this network's."""
    if config.get("_class_name") != CLASS_NAME:
        raise ValueError(f"{where}: _class_name: expected {CLASS_NAME!r}, got {config.get('_class_name')!r}")
    for field, only in _ONLY.items():
        if field in config and config[field] != only:
            raise ValueError(f"{where}: {field}: expected {only!r}, got {config[field]!r}")
    for field, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        if set(config.get(field, [kind])) != {kind}:
            raise ValueError(f"{where}: {field}: expected {kind!r} throughout, got {config[field]!r}")
    groups = config.get("norm_num_groups", NORM_GROUPS)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"{where}: norm_num_groups: expected a positive integer, got {groups!r}")
    return groups


def _scale_of_config(
    config: Mapping[str, Any], scaling_factor: float | None, shift_factor: float | None, *, where: str
) -> tuple[float, float]:
    stated = {"scaling_factor": scaling_factor, "shift_factor": shift_factor}
    found = {
        "scaling_factor": config.get("scaling_factor", _USUAL_SCALE),
        "shift_factor": config.get("shift_factor") or 0.0,
    }
    for field, value in found.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"{where}: {field}: expected a number, got {value!r}")
        if stated[field] is not None and stated[field] != value:
            raise ValueError(f"{where}: {field}: expected {stated[field]}, got {value}")
    return float(found["scaling_factor"]), float(found["shift_factor"])


# --- keys --------------------------------------------------------------------------------------------------------


def _of_image_vae(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the diffusion model around it, and without what belongs to training."""
    if any(key.startswith(LDM_PREFIX) for key in tensors):
        tensors = {key.removeprefix(LDM_PREFIX): t for key, t in tensors.items() if key.startswith(LDM_PREFIX)}
    return {key: tensor for key, tensor in tensors.items() if not key.startswith(("loss.", "model_ema."))}


_LDM_TO_DIFFUSERS = (
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.down\.(\d+)\.block\.(\d+)\.", r".down_blocks.\1.resnets.\2."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
)


def _in_diffusers_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """LDM's names and those of old diffusers releases as today's; LDM counts the decoder's levels from the finest."""
    levels = [int(found[1]) for key in tensors if (found := re.match(r"decoder\.up\.(\d+)\.", key))]
    deepest = max(levels, default=0)
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        name = re.sub(r"\.up\.(\d+)\.block\.", lambda m: f".up_blocks.{deepest - int(m[1])}.resnets.", key)
        name = re.sub(r"\.up\.(\d+)\.upsample\.", lambda m: f".up_blocks.{deepest - int(m[1])}.upsamplers.0.", name)
        for pattern, replacement in _LDM_TO_DIFFUSERS:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return with_new_attention_keys(renamed)


def _with_quant_convs(tensors: Mapping[str, Tensor], *, where: str) -> dict[str, Tensor]:
    filled = dict(tensors)
    sizes = {"quant_conv": ("encoder.conv_out.weight", 0), "post_quant_conv": ("decoder.conv_in.weight", 1)}
    for name, (neighbour, side) in sizes.items():
        channels = _shape(tensors, neighbour, where=where)[side]
        if f"{name}.weight" not in tensors:
            filled[f"{name}.weight"] = torch.eye(channels).view(channels, channels, 1, 1)
            filled[f"{name}.bias"] = torch.zeros(channels)
    return filled


def _image_vae_of(tensors: Mapping[str, Tensor], groups: int, *, where: str) -> ImageVAE:
    """The network whose keys and shapes these are, on the meta device."""
    widths: list[int] = []
    while (key := f"encoder.down_blocks.{len(widths)}.resnets.0.conv1.weight") in tensors:
        widths.append(tensors[key].shape[0])
    first = _shape(tensors, "encoder.conv_in.weight", where=where)
    latent = _shape(tensors, "decoder.conv_in.weight", where=where)
    if len(first) != 4:
        raise ValueError(
            f"{where}: encoder.conv_in.weight: expected a 2-D convolution's of an image VAE, got shape {first}"
        )
    if not widths or any(width % groups for width in widths):
        raise ValueError(f"{where}: widths: expected positive multiples of {groups}, got {tuple(widths)}")
    with torch.device("meta"):
        vae = ImageVAE(in_channels=first[1], latent_channels=latent[1], widths=widths, norm_groups=groups)
    check_tensors(tensors, vae, where=where)
    return vae


def _shape(tensors: Mapping[str, Tensor], key: str, *, where: str) -> tuple[int, ...]:
    if key not in tensors or tensors[key].ndim < 4:
        raise ValueError(f"{where}: missing key {key!r} of an image VAE, got {len(tensors)} keys")
    return tuple(tensors[key].shape)
