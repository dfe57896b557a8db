"""Which `IVVAESpec` a checkpoint is: from keys and shapes, as the authors' flat .pth needs, or from our config.json.

The authors publish no config. What shapes cannot say is the published model's own: group causal convolutions for two
branches, causal ones for the baseline; scale and shift are known for the published sizes, and 1 and 0 for others.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from cvvae.iv_vae import IVVAE_SPECS, IVVAESpec

CLASS_NAME = "IVVAE"
"""`_class_name` in the config.json that `save_vae` writes; no other software reads it."""

_FIRST_CONVS = {"ivvae": "encoder.conv1.conv_3d.weight", "ivvae-baseline": "encoder.conv1.conv.weight"}
_MODELS = {"ivvae": IVVAE_SPECS["ivvae-z4-dim64"], "ivvae-baseline": IVVAE_SPECS["ivvae-baseline"]}


def spec_from_config(config: Mapping[str, Any], *, where: str) -> IVVAESpec:
    """The inverse of `config_from_spec`. ValueError on fields that are missing, unknown or of another type."""
    values = {key: value for key, value in config.items() if key != "_class_name"}
    expected = {field.name for field in fields(IVVAESpec)}
    if set(values) != expected:
        raise ValueError(
            f"{where}: fields: missing {sorted(expected - set(values))}, unknown {sorted(set(values) - expected)}"
        )
    values: dict[str, Any] = {key: tuple(item) if isinstance(item, list) else item for key, item in values.items()}
    example = _MODELS["ivvae"]
    for key, value in values.items():
        allowed = {type(getattr(example, key))} | _OTHER_TYPES.get(key, set())
        if type(value) not in allowed:
            kinds = " or ".join(sorted(kind.__name__ for kind in allowed))
            raise ValueError(f"{where}: {key}: expected {kinds}, got {value!r}")
    try:
        return IVVAESpec(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


_OTHER_TYPES: dict[str, set[type]] = {
    "scaling_factor": {int, tuple},
    "shift_factor": {int, tuple},
    "tile_frames": {int},
    "tile_size": {int},
    "tile_overlap": {int},
}


def config_from_spec(spec: IVVAESpec) -> dict[str, Any]:
    """Every field of the spec, and whose it is."""
    return {"_class_name": CLASS_NAME, **spec.to_dict()}


def recognises(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the keys are IV-VAE's or the baseline's: a first 3-D convolution and latent ones beside the halves."""
    return _family(tensors) is not None


def _family(tensors: Mapping[str, Tensor]) -> str | None:
    if not any(key.startswith("conv2.") for key in tensors):
        return None
    found = [family for family, key in _FIRST_CONVS.items() if key in tensors and tensors[key].ndim == 5]
    return found[0] if len(found) == 1 else None


def spec_from_tensors(tensors: Mapping[str, Tensor], *, where: str) -> IVVAESpec:
    """The spec whose keys these are. ValueError if something is missing without which that cannot be told."""
    family = _family(tensors)
    assert family is not None, "only recognised tensors come here"

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors or tensors[key].ndim < 2:
            raise ValueError(f"{where}: missing key {key!r}, without which the model cannot be recognised")
        return tuple(tensors[key].shape)

    first = _FIRST_CONVS[family]
    two = family == "ivvae"
    if not two:
        branches = "one"
    else:
        branches = "3d+3d" if len(shape("encoder.conv1.conv_2d.weight")) == 5 else "2d+3d"
    attention = f"encoder.downsamples.9.{'Attention_3d' if two else 'attention'}.to_qkv.weight"
    try:
        spec = replace(
            _MODELS[family],
            in_channels=shape(first)[1],
            width=shape(first)[0] if two else shape(first)[0] // 2,
            latent_channels=shape("conv2.conv_3d.weight" if two else "conv2.conv.weight")[1],
            branches=branches,
            encoder_head="pac" if "encoder.head.2.PAC_conv.conv.weight" in tensors else "conv",
            attention="deep" if attention in tensors else "middle",
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _named(spec)


def _named(spec: IVVAESpec) -> IVVAESpec:
    """The named spec of the same architecture, with its scale and shift; else '-custom' without any."""
    for known in IVVAE_SPECS.values():
        normalised = {"scaling_factor": known.scaling_factor, "shift_factor": known.shift_factor}
        if replace(spec, name=known.name, **normalised) == known:
            return known
    return replace(spec, name=f"{spec.family}-custom", scaling_factor=1.0, shift_factor=0.0)
