"""Fields of a spec that a family's published config.json has no place for.

A saved model must come back as the same spec, tile plan and scale included. Where the authors keep those in code,
they are written under the spec's own names beside the authors' fields, and only if they are not the family's usual
ones: a published model is saved with the published fields alone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from cvvae.spec import VAESpec

S = TypeVar("S", bound=VAESpec)


def written(spec: VAESpec, usual: VAESpec, names: Iterable[str]) -> dict[str, Any]:
    """The named fields in which `spec` is not `usual`, ready for JSON."""
    values, usual_values = spec.to_dict(), usual.to_dict()
    return {name: values[name] for name in names if values[name] != usual_values[name]}


def read_back(config: Mapping[str, Any], usual: VAESpec, names: Iterable[str], *, where: str) -> dict[str, Any]:
    """The named fields that `config` has, as a spec holds them. ValueError on another type than `usual` has there."""
    values: dict[str, Any] = {}
    for name in names:
        if name not in config:
            continue
        value, default = config[name], getattr(usual, name)
        whole = isinstance(default, int)
        types = (int,) if whole else (int, float)
        items = value if isinstance(value, list) and not whole else [value]
        if not (value is None and whole) and not all(type(item) in types for item in items):
            expected = "an integer or null" if whole else "a number, or one for each channel"
            raise ValueError(f"{where}: {name}: expected {expected}, got {value!r}")
        values[name] = tuple(value) if isinstance(value, list) else value
    return values


def named(spec: S, known: Iterable[S]) -> S:
    """The spec under the name it has among `known`, or under its family's with '-custom' if it is none of those."""
    for other in known:
        if replace(spec, name=other.name) == other:
            return other
    return replace(spec, name=f"{spec.family}-custom")
