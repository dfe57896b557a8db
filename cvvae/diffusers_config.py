"""Which `DiffusersSpec` a diffusers folder is, from its config.json, and the config.json of a spec.

The config decides, never the tensors: Stable Diffusion's VAE and SDXL's have the same keys and shapes and another
scale, so a bare weight file is not enough. An argument that nobody here knows is refused, for it may decide numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from cvvae.config_fields import named, read_back, written
from cvvae.diffusers_vae import DiffusersSpec, as_json, check_arguments
from cvvae.spec import VAESpec

S = TypeVar("S", bound=DiffusersSpec)

_DECIDED_HERE = {"name", "family", "in_channels", "latent_channels", "time_stride", "space_stride", "pixel_range"}
_DECIDED_THERE = {"config", "diffusers", "scaling_factor", "shift_factor"}
_NORMALISATION = frozenset({"scaling_factor", "shift_factor", "latents_mean", "latents_std"})


def spec_from_config(config: Mapping[str, Any], *, known: Iterable[S], where: str) -> S:
    """The spec that a diffusers config.json describes; `known` are the family's own, of which it may be one.

    ValueError naming the argument, what was expected and what the file at `where` has.
    """
    known = tuple(known)
    usual = known[0]
    peer = usual.peer
    own = _own_fields(usual)
    unknown = [
        name
        for name in config
        if not name.startswith("_") and name not in {*peer.arguments, *peer.ignored, *_NORMALISATION, *own}
    ]
    if unknown:
        raise ValueError(f"{where}: expected arguments of {peer.name} that are known here, got {sorted(unknown)}")
    arguments = {
        name: _as_written(config[name], default) for name, default in peer.arguments.items() if name in config
    }
    try:
        check_arguments(peer, {**peer.arguments, **arguments})
        geometry = peer.geometry({**peer.arguments, **arguments})
        spec = replace(
            usual,
            config=peer.complete(arguments),
            **geometry._asdict(),
            **_normalisation(config, usual, geometry.latent_channels),
            **read_back(config, usual, own, where=where),
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return _named(spec, known)


def config_from_spec(spec: DiffusersSpec, *, known: Iterable[DiffusersSpec]) -> dict[str, Any]:
    """The config.json of a spec, keys sorted, as diffusers reads it; what it has no place for stands beside that."""
    usual = next(iter(known))
    config = {
        **as_json(spec.arguments),
        **_normalisation_arguments(spec),
        **written(spec, usual, _own_fields(usual)),
    }
    return {"_class_name": spec.peer.name, **dict(sorted(config.items()))}


def _named(spec: S, known: Iterable[S]) -> S:
    """As `named`; where the weights hold the statistics, the network alone decides."""
    if not spec.peer.statistics_in_weights:
        return named(spec, known)
    scale, shift = spec.scaling_factor, spec.shift_factor
    as_usual = [replace(other, scaling_factor=scale, shift_factor=shift) for other in known if _as_wide(other, spec)]
    return named(spec, as_usual)


def _as_wide(spec: VAESpec, other: VAESpec) -> bool:
    return spec.latent_channels == other.latent_channels


def _own_fields(spec: VAESpec) -> list[str]:
    """Fields that diffusers has no argument for: tiles, and how this package drives the network."""
    return [item.name for item in fields(spec) if item.name not in _DECIDED_HERE | _DECIDED_THERE]


def _as_written(value: Any, default: Any) -> Any:
    """One way to write a value: 4.0 where the default is 4 would be another identity of the same model."""
    same_number = type(value) in (int, float) and type(default) in (int, float) and value == default
    return default if same_number else _frozen(value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, (list, tuple)) else value


# --- normalisation: (z - mean) * scaling_factor / std there, (z - shift) * scale here -------------------------------


def _normalisation(config: Mapping[str, Any], usual: DiffusersSpec, channels: int) -> dict[str, Any]:
    peer = usual.peer
    for name in _NORMALISATION - set(peer.normalised_by):
        if config.get(name) is not None:
            raise ValueError(f"{name}: expected nothing, {peer.name} has no such argument, got {config[name]!r}")
    if peer.statistics_in_weights:  # the config has a factor alone
        scale = _number(config, "scaling_factor", 1.0)
        return {"scaling_factor": (scale,) * channels, "shift_factor": (0.0,) * channels}
    mean, std = (_numbers(config, name, channels) for name in ("latents_mean", "latents_std"))
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std: expected both or neither")
    if mean is None or std is None:
        if "latents_mean" in peer.normalised_by and "shift_factor" not in peer.normalised_by:
            # classes that always have a mean and std: what the config leaves out is the class's default
            return {"scaling_factor": usual.scaling_factor, "shift_factor": usual.shift_factor}
        scale = _number(config, "scaling_factor", usual.scaling_factor)
        return {"scaling_factor": scale, "shift_factor": _number(config, "shift_factor", 0.0)}
    if 0 in std:
        raise ValueError("latents_std: expected numbers other than 0, got 0")
    scale = _number(config, "scaling_factor", 1.0) if "scaling_factor" in peer.normalised_by else 1.0
    return {"scaling_factor": tuple(scale / deviation for deviation in std), "shift_factor": mean}


def _number(config: Mapping[str, Any], name: str, default: Any) -> Any:
    value = config.get(name)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    return float(value)


def _numbers(config: Mapping[str, Any], name: str, count: int) -> tuple[float, ...] | None:
    value = config.get(name)
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or len(value) != count or any(type(v) not in (int, float) for v in value):
        raise ValueError(f"{name}: expected {count} numbers, one for each latent channel, got {value!r}")
    return tuple(float(item) for item in value)


def _normalisation_arguments(spec: DiffusersSpec) -> dict[str, Any]:
    names = spec.peer.normalised_by
    if spec.peer.statistics_in_weights:
        return {"scaling_factor": 1.0}
    scale, shift = spec.scaling_factor, spec.shift_factor
    if "latents_mean" in names and (isinstance(scale, tuple) or isinstance(shift, tuple)):
        channels = spec.latent_channels
        arguments: dict[str, Any] = {
            "latents_mean": list(_each(shift, channels)),
            "latents_std": [reciprocal(factor) for factor in _each(scale, channels)],
        }
        return {**arguments, "scaling_factor": 1.0} if "scaling_factor" in names else arguments
    if isinstance(scale, tuple) or isinstance(shift, tuple):
        raise ValueError(f"scaling_factor, shift_factor: expected one number each for {spec.peer.name}, got tuples")
    if "shift_factor" not in names and shift != 0:
        raise ValueError(f"shift_factor: expected 0, {spec.peer.name} has no such argument, got {shift}")
    arguments = {"scaling_factor": scale}
    return {**arguments, "shift_factor": shift} if "shift_factor" in names else arguments


def _each(value: float | tuple[float, ...], channels: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * channels


def reciprocal(factor: float) -> float:
    """The number whose reciprocal is exactly `factor`, as short as it can be: what was divided by comes back."""
    for digits in (4, 8, 12, 15):
        rounded = round(1 / factor, digits)
        if rounded != 0 and 1 / rounded == factor:
            return rounded
    return 1 / factor


# --- checkpoints that hold mean and std as tensors (LTX) ------------------------------------------------------------


def spec_with_latent_statistics(spec: S, tensors: Mapping[str, Tensor], *, where: str) -> S:
    """`spec` normalised by the checkpoint's `latents_mean` and `latents_std`. ValueError if they are missing."""
    for name in ("latents_mean", "latents_std"):
        if name not in tensors or tensors[name].shape != (spec.latent_channels,):
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            raise ValueError(f"{where}: {name}: expected a tensor ({spec.latent_channels},), got {got}")
    mean, std = tensors["latents_mean"].double(), tensors["latents_std"].double()
    if not std.all():
        raise ValueError(f"{where}: latents_std: expected numbers other than 0, got 0")
    factors = _each(spec.scaling_factor, spec.latent_channels)
    scale = tuple(factor / float(deviation) for factor, deviation in zip(factors, std, strict=True))
    return replace(spec, scaling_factor=scale, shift_factor=tuple(mean.tolist()))


def latent_statistics(spec: DiffusersSpec) -> dict[str, Tensor]:
    """The tensors that `spec_with_latent_statistics` reads back, if they came from float32."""
    std = [1 / factor for factor in _each(spec.scaling_factor, spec.latent_channels)]
    mean = _each(spec.shift_factor, spec.latent_channels)
    return {"latents_mean": torch.tensor(mean), "latents_std": torch.tensor(std)}
