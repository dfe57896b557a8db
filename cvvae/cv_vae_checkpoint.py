"""Which `CVVAESpec` a checkpoint is: from the authors' config.json, or from the keys and shapes of its tensors.

Never from file names. A config that asks for something this code would silently do differently is refused, and so is
a field nobody here has heard of: it might decide numbers.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from cvvae.cv_vae import CVVAE_SPECS, LAYOUTS, CVVAESpec

CLASS_NAMES: dict[str, str] = {"CVVAEModel": "cvvae-sd21", "CVVAESD3Model": "cvvae-sd3"}

# Config field -> spec field, where the value is taken over as it stands.
_SHARED_FIELDS: dict[str, str] = {
    "in_channels": "in_channels",
    "half_3d": "half_3d",
    "time_n_compress": "time_stride",
    "spatial_n_compress": "space_stride",
    "en_de_n_frames_a_time": "tile_frames",
    "tile_spatial_size": "tile_size",
    "tile_overlap_ratio": "tile_overlap",
    "scaling_factor": "scaling_factor",
    "shift_factor": "shift_factor",
    "norm_num_groups": "norm_groups",
}
_FIELDS: dict[str, dict[str, str]] = {
    "CVVAEModel": {**_SHARED_FIELDS, "z_channels": "latent_channels", "num_res_blocks": "num_res_blocks"},
    "CVVAESD3Model": {
        **_SHARED_FIELDS,
        "out_channels": "latent_channels",  # the authors' name: the decoder's output has in_channels
        "layers_per_block": "num_res_blocks",
    },
}
# Fields with no counterpart here: the only values this code reproduces, the first of which is written by save_vae.
_SHARED_FIXED: dict[str, tuple[Any, ...]] = {
    "causal_decoder": (False,),
    "causal_encoder": (True,),
    "double_z": (True,),
    "reshape_x_dim_to_4": (False,),
}
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "CVVAEModel": {
        **_SHARED_FIXED,
        "attn_resolutions": ([],),
        "decoder_attn_type": ("spatial-temporal-xformer",),
        "encoder_attn_type": ("vanilla-xformers", "vanilla"),
        "dropout": (0.0,),
        "use_3d_conv": (True,),
    },
    "CVVAESD3Model": {**_SHARED_FIXED, "act_fn": ("silu",), "mid_block_add_attention": (True,)},
}
# Written for the authors' code; here they decide nothing: a flag nobody reads, and how 4-D input is folded to clips.
_IGNORED: dict[str, dict[str, Any]] = {
    "CVVAEModel": {"force_upcast": True, "num_video_frames": None, "reshape_z_dim_to_4": False},
    "CVVAESD3Model": {"num_video_frames": None, "reshape_z_dim_to_4": False},
}
# Fields left out of a saved config while they have the family's own value: the authors' configs lack them.
_WRITTEN_IF_UNUSUAL: dict[str, tuple[str, ...]] = {
    "CVVAEModel": ("shift_factor", "norm_num_groups"),
    "CVVAESD3Model": ("scaling_factor", "shift_factor"),
}
_SD3_BLOCK_TYPES = {"down_block_types": "DownEncoderBlock3D", "up_block_types": "UpDecoderBlock3D"}


def spec_from_config(config: Mapping[str, Any], *, where: str) -> CVVAESpec:
    """The spec an authors' config.json describes; absent fields have the constructor's defaults.

    ValueError naming the field, what was expected and what the file at `where` has.
    """
    class_name = config.get("_class_name")
    if class_name not in CLASS_NAMES:
        raise ValueError(f"{where}: _class_name: expected one of {sorted(CLASS_NAMES)}, got {class_name!r}")
    base = CVVAE_SPECS[CLASS_NAMES[class_name]]
    known = {**_FIELDS[class_name], **_FIXED[class_name], **_IGNORED[class_name]}
    values: dict[str, Any] = {"widths": _widths_from_config(class_name, config, base, where=where)}
    for field, value in config.items():
        if field in _FIELDS[class_name]:
            values[_FIELDS[class_name][field]] = value
        elif field in _FIXED[class_name] and value not in _FIXED[class_name][field]:
            expected = " or ".join(repr(choice) for choice in _FIXED[class_name][field])
            raise ValueError(f"{where}: {field}: expected {expected}, got {value!r}; other values are not supported")
        elif field not in known and field not in _WIDTH_FIELDS[class_name] and not field.startswith("_"):
            raise ValueError(f"{where}: {field}: expected a field of {class_name}, got an unknown one = {value!r}")
    if class_name == "CVVAEModel" and config.get("out_ch", base.in_channels) != values.get("in_channels", 3):
        raise ValueError(f"{where}: out_ch: expected in_channels, got {config['out_ch']!r}")
    _check_types(values, base, where=where)
    try:
        return named(replace(base, **values))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_WIDTH_FIELDS: dict[str, tuple[str, ...]] = {
    "CVVAEModel": ("ch", "ch_mult", "out_ch"),
    "CVVAESD3Model": ("block_out_channels", *_SD3_BLOCK_TYPES),
}


def _widths_from_config(
    class_name: str, config: Mapping[str, Any], base: CVVAESpec, *, where: str
) -> tuple[int, ...]:
    field, listed = "block_out_channels", config.get("block_out_channels", list(base.widths))
    width = 1
    if class_name == "CVVAEModel":
        field, listed, width = "ch_mult", config.get("ch_mult", [1, 2, 4, 4]), config.get("ch", base.widths[0])
    if type(width) is not int:
        raise ValueError(f"{where}: ch: expected an integer, got {width!r}")
    if not isinstance(listed, list | tuple) or not all(type(item) is int for item in listed):
        raise ValueError(f"{where}: {field}: expected a list of integers, got {listed!r}")
    for block_field, block_type in _SD3_BLOCK_TYPES.items():
        types = config.get(block_field)
        if types is not None and list(types) != [block_type] * len(listed):
            raise ValueError(f"{where}: {block_field}: expected {len(listed)} times {block_type!r}, got {types!r}")
    return tuple(width * item for item in listed)


def _check_types(values: Mapping[str, Any], base: CVVAESpec, *, where: str) -> None:
    for field, value in values.items():
        default = getattr(base, field)
        may_be_none = field in ("tile_frames", "tile_size") and value is None
        allowed = (int, float) if isinstance(default, float) else type(default)
        wrong = not isinstance(value, allowed) or (isinstance(value, bool) and not isinstance(default, bool))
        if wrong and not may_be_none:
            raise ValueError(f"{where}: {field}: expected a {type(default).__name__}, got {value!r}")


def config_from_spec(spec: CVVAESpec) -> dict[str, Any]:
    """The authors' config.json of a spec: what `spec_from_config` reads back as the same spec, keys sorted."""
    class_name = next((name for name, family in CLASS_NAMES.items() if family == spec.family), None)
    if class_name is None:
        raise ValueError(f"family: expected one of {sorted(CLASS_NAMES.values())}, got {spec.family!r}")
    usual = CVVAE_SPECS[spec.family]
    config: dict[str, Any] = {"_class_name": class_name, **_IGNORED[class_name]}
    config.update({field: choices[0] for field, choices in _FIXED[class_name].items()})
    for config_field, spec_field in _FIELDS[class_name].items():
        value = getattr(spec, spec_field)
        if config_field in _WRITTEN_IF_UNUSUAL[class_name] and value == getattr(usual, spec_field):
            continue
        config[config_field] = value
    if class_name == "CVVAEModel":
        base_width = spec.widths[0]
        if any(width % base_width for width in spec.widths):
            raise ValueError(f"widths: a {class_name} config holds multiples of the first only, got {spec.widths}")
        config.update(ch=base_width, ch_mult=[width // base_width for width in spec.widths], out_ch=spec.in_channels)
    else:
        config["block_out_channels"] = list(spec.widths)
        config.update({field: [block_type] * len(spec.widths) for field, block_type in _SD3_BLOCK_TYPES.items()})
    return dict(sorted(config.items()))


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are those of one of the two layouts."""
    return len(_families(tensors)) == 1


def _families(tensors: Mapping[str, Tensor]) -> list[str]:
    """A 3-D first convolution under either layout's name: image VAEs have the names, too."""
    firsts = {name: f"encoder.{kind.down.format(level=0, block=0)}.conv1.weight" for name, kind in LAYOUTS.items()}
    # and Wan 2.2 has one of the two, with other norms
    norms = {name: key.replace("conv1", "norm1") for name, key in firsts.items()}
    return [
        name for name, key in firsts.items() if key in tensors and tensors[key].ndim == 5 and norms[name] in tensors
    ]


def spec_from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> CVVAESpec:
    """The spec whose encoder.*/decoder.* keys these are. What shapes cannot say (tiles, scale) is the family's own.

    ValueError if something is missing without which that cannot be told.
    """
    families = _families(tensors)
    assert len(families) == 1, "only recognised tensors come here"
    family = families[0]
    layout = LAYOUTS[family]

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise ValueError(f"{where}: missing key {key!r}, without which the model cannot be recognised")
        return tuple(tensors[key].shape)

    num_levels = _count(tensors, "encoder." + layout.down.format(level="#", block=0) + ".conv1.weight")
    first_convs = ["encoder." + layout.down.format(level=level, block=0) for level in range(num_levels)]
    upsamplers = re.compile(re.escape("decoder." + layout.upsample + ".conv.weight").replace(r"\{level\}", r"\d+"))
    doubling = [key for key in tensors if upsamplers.fullmatch(key) and shape(key)[0] == 2 * shape(key)[1]]
    base = CVVAE_SPECS[family]
    try:
        spec = replace(
            base,
            in_channels=shape("encoder.conv_in.weight")[1],
            latent_channels=shape("decoder.conv_in.weight")[1],
            widths=tuple(shape(f"{block}.conv1.weight")[0] for block in first_convs),
            num_res_blocks=_count(tensors, "encoder." + layout.down.format(level=0, block="#") + ".conv1.weight"),
            half_3d=len(shape(f"{first_convs[0]}.conv2.weight")) == 4,
            time_stride=2 ** len(doubling),
            space_stride=2 ** (num_levels - 1),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return named(spec)


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    """How many of pattern.replace('#', 0), ('#', 1), ... are keys before the first that is not."""
    number = 0
    while pattern.replace("#", str(number)) in tensors:
        number += 1
    return number


def named(spec: CVVAESpec) -> CVVAESpec:
    """The spec under the name it has in SPECS, or under its family's with '-custom' if it is none of those."""
    for known in CVVAE_SPECS.values():
        if replace(spec, name=known.name) == known:
            return known
    return replace(spec, name=f"{spec.family}-custom")
