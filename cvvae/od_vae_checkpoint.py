"""Which `ODVAESpec` a checkpoint is: from the authors' config.json, or from the keys and shapes of its tensors.

The class name CausalVAEModel covers three releases of different networks, told apart by the config alone; this is the
third (1.2). What is decided by fields whose defaults are another network's must therefore be there.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from cvvae.config_fields import named, read_back, written
from cvvae.od_vae import ODVAE_SPECS, ODVAESpec

CLASS_NAME = "CausalVAEModel"

_FIXED: dict[str, Any] = {
    "q_conv": "CausalConv3d",
    "encoder_conv_in": "Conv2d",
    "encoder_conv_out": "CausalConv3d",
    "encoder_attention": "AttnBlock3DFix",
    "encoder_mid_resnet": "ResnetBlock3D",
    "encoder_resnet_blocks": ["ResnetBlock2D"] * 2 + ["ResnetBlock3D"] * 2,
    "encoder_spatial_downsample": ["Downsample", *["Spatial2xTime2x3DDownsample"] * 2, ""],
    "encoder_temporal_downsample": [""] * 4,
    "decoder_conv_in": "CausalConv3d",
    "decoder_conv_out": "CausalConv3d",
    "decoder_attention": "AttnBlock3DFix",
    "decoder_mid_resnet": "ResnetBlock3D",
    "decoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "decoder_spatial_upsample": ["", "SpatialUpsample2x", *["Spatial2xTime2x3DUpsample"] * 2],
    "decoder_temporal_upsample": [""] * 4,
}
"""Fields that must be there, with the only values that this network has."""
_FIXED_IF_THERE: dict[str, Any] = {"double_z": True, "use_quant_layer": True, "attn_resolutions": []}
_SIZES = ("hidden_size", "z_channels", "embed_dim", "num_res_blocks")
_DEAD: dict[str, Any] = {"dropout": 0.0, "resolution": 256}
_OWN = (
    "in_channels",
    "scaling_factor",
    "shift_factor",
    "tile_frames",
    "decode_tile_frames",
    "tile_size",
    "tile_overlap",
)
_BASE = ODVAE_SPECS["od-vae"]


def spec_from_config(config: Mapping[str, Any], *, where: str) -> ODVAESpec:
    """The spec an authors' config.json describes; fields that decide nothing here are ignored, whatever their name.

    ValueError naming the field, what was expected and what the file at `where` has.
    """
    for field, value in {**_FIXED, **_FIXED_IF_THERE}.items():
        if field not in config and field in _FIXED:
            raise ValueError(
                f"{where}: {field}: expected {value!r}, got nothing; without it the authors' code builds another "
                "model"
            )
        if config.get(field, value) != value:
            raise ValueError(
                f"{where}: {field}: expected {value!r} (Open-Sora-Plan 1.2), got {config[field]!r}; "
                "other values are not supported"
            )
    for field in _SIZES:
        if type(config.get(field)) is not int:
            raise ValueError(f"{where}: {field}: expected an integer, got {config.get(field)!r}")
    multiples = config.get("hidden_size_mult")
    if not isinstance(multiples, list) or not all(type(item) is int for item in multiples):
        raise ValueError(f"{where}: hidden_size_mult: expected a list of integers, got {multiples!r}")
    if config["embed_dim"] != config["z_channels"]:
        raise ValueError(
            f"{where}: embed_dim: expected z_channels ({config['z_channels']}), got {config['embed_dim']}"
        )
    values = read_back(config, _BASE, _OWN, where=where)
    try:
        spec = replace(
            _BASE,
            widths=tuple(config["hidden_size"] * multiple for multiple in multiples),
            latent_channels=config["z_channels"],
            num_res_blocks=config["num_res_blocks"],
            **values,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return named(spec, ODVAE_SPECS.values())


def config_from_spec(spec: ODVAESpec) -> dict[str, Any]:
    """The authors' config.json of a spec: what `spec_from_config` reads back as the same spec, keys sorted."""
    base_width = spec.widths[0]
    if any(width % base_width for width in spec.widths):
        raise ValueError(f"widths: a {CLASS_NAME} config holds multiples of the first only, got {spec.widths}")
    config = {
        "_class_name": CLASS_NAME,
        **_FIXED,
        **_FIXED_IF_THERE,
        **_DEAD,
        "hidden_size": base_width,
        "hidden_size_mult": [width // base_width for width in spec.widths],
        "z_channels": spec.latent_channels,
        "embed_dim": spec.latent_channels,
        "num_res_blocks": spec.num_res_blocks,
        **written(spec, _BASE, _OWN),
    }
    return dict(sorted(config.items()))


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are OD-VAE's: 2-D fine levels, and a downsampler of time whose key has `conv` twice."""
    fine = tensors.get("encoder.down.0.block.0.conv1.weight")
    down = tensors.get("encoder.down.1.downsample.conv.conv.weight")
    return fine is not None and fine.ndim == 4 and down is not None and down.ndim == 5


def spec_from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> ODVAESpec:
    """The spec whose keys these are. What shapes cannot say (tiles, scale) is the release's own.

    ValueError if something is missing without which that cannot be told.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise ValueError(f"{where}: missing key {key!r}, without which the model cannot be recognised")
        return tuple(tensors[key].shape)

    def width(level: int) -> int:
        return shape(f"encoder.down.{level}.block.0.norm2.weight")[0]

    num_res_blocks = 0
    while f"encoder.down.0.block.{num_res_blocks}.norm1.weight" in tensors:
        num_res_blocks += 1
    try:
        spec = replace(
            _BASE,
            in_channels=shape("encoder.conv_in.weight")[1],
            latent_channels=shape("decoder.conv_in.conv.weight")[1],
            widths=tuple(width(level) for level in range(len(_BASE.widths))),
            num_res_blocks=num_res_blocks,
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return named(spec, ODVAE_SPECS.values())
