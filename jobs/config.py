"""Configs: YAML files read into frozen models, with overrides from the command line and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import ConfigError
from pipeline.policies import Policy, refuse_secrets
from pipeline.run import EncodeSettings

ConfigType = TypeVar("ConfigType", bound=BaseModel)


class ClusterConfig(Policy):
    """Where a run runs. None means: derived from what the cluster has."""

    address: str | None = None
    """Ray address; None uses $RAY_ADDRESS (set inside a submitted job), else starts Ray on this machine."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    decode_children: Annotated[int, Field(ge=1)] | None = None
    """Decode processes per encode actor."""
    max_attempts: Annotated[int, Field(ge=2)] = 3
    """A shard that was begun this often without an end is not tried again. From the second time on it runs alone in
    its actor, so that only its own end counts."""
    on_poison_shard: Literal["stop", "set_aside"] = "stop"
    shard_timeout_minutes: Annotated[float, Field(ge=1)] = 240.0
    """Ray ends the run if nothing at all comes back for this long."""


class EncodeConfig(EncodeSettings):
    """configs/encode/*.yaml"""

    cluster: ClusterConfig = ClusterConfig()


def load_config(model: type[ConfigType], path: Path | str, overrides: Sequence[str] = ()) -> ConfigType:
    """Read a YAML config, apply `a.b=value` overrides (values are YAML), validate.

    ConfigError names the file, the setting, what was expected and what was given; an unknown setting comes with the
    nearest known one.
    """
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"config {path} does not exist (relative paths start at {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"config {path}: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}: expected a mapping of settings, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"config {path}:\n  " + "\n  ".join(_problems(model, error))) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")):
        raise ConfigError(f"--set: expected section.setting=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {name}: value is not YAML: {error}") from error
    *sections, last = name.split(".")
    place = raw
    for section in sections:
        if place.get(section) is None:  # absent, or a header with nothing under it
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ConfigError(f"--set {name}: {section} is a value, not a section")
    place[last] = value


def _problems(model: type[BaseModel], error: ValidationError) -> Iterator[str]:
    """A line per problem. What is said of a part makes what follows from it for the whole superfluous."""
    problems = [(_path(model, problem), problem) for problem in error.errors()]
    lines = [
        _explain(model, path, problem)
        for path, problem in problems
        if not any(len(other) > len(path) and other[: len(path)] == path for other, _ in problems)
    ]
    yield from dict.fromkeys(lines)


def _path(model: type[BaseModel], problem: Any) -> tuple[str, ...]:
    """The setting as the user wrote it: without the names that pydantic puts in for the members of a union."""
    *parents, last = (str(part) for part in problem["loc"]) if problem["loc"] else [""]
    tags = {tag for field in model.model_fields.values() for m in _models_in(field.annotation) for tag in _tags(m)}
    path = [part for part in parents if part not in tags and "[" not in part]
    is_label = problem["type"] != "extra_forbidden" and ("[" in last or last in tags)
    return tuple(path) if is_label else (*path, last)


def _explain(model: type[BaseModel], path: tuple[str, ...], problem: Any) -> str:
    """One line: where, what was expected, what was given."""
    where = ".".join(path) or "(config)"
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_settings(model, [str(part) for part in problem["loc"][:-1]]))
        near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown setting; {hint}"
    message = problem["msg"].removeprefix("Value error, ")
    # our own errors say what they got; a mapping may hold a credential
    if problem["type"] in ("missing", "value_error") or isinstance(problem["input"], dict):
        return f"{where}: {message}"
    return f"{where}: {message}, got {_shown(problem['input'])}"


def _shown(value: Any) -> str:
    try:
        refuse_secrets(value)
    except ValueError:
        return "something that looks like a credential"
    return repr(value)[:200]


def _known_settings(model: type[BaseModel], location: Sequence[str]) -> set[str]:
    """Names that are allowed at a location; unions are searched by their tag, which pydantic puts in the location."""
    models: list[type[BaseModel]] = [model]
    for part in location:
        fields = [m.model_fields[part].annotation for m in models if part in m.model_fields]
        if fields:
            models = [found for annotation in fields for found in _models_in(annotation)]
        else:
            models = [m for m in models if part in _tags(m)] or models
    return {name for m in models for name in m.model_fields}


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in getattr(annotation, "__args__", ()):
        yield from _models_in(argument)


def _tags(model: type[BaseModel]) -> tuple[str, ...]:
    kind = model.model_fields.get("kind")
    return getattr(kind.annotation, "__args__", ()) if kind is not None else ()
