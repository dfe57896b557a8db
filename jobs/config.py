"""Configs: YAML files read into frozen models, with overrides from the command line and errors that help."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from cvvae import SPECS
from pipeline.checkpoints import VAESource
from pipeline.error_budget import ErrorBudget
from pipeline.errors import ConfigError
from pipeline.policies import Policy, refuse_secrets
from pipeline.run import EncodeSettings

_EXPECTED = {
    "missing": "must be given",
    "string_type": "expected text",
    "tuple_type": "expected a list",
    "dict_type": "expected a mapping",
    "model_type": "expected a mapping of settings",
    "model_attributes_type": "expected a mapping of settings",
}
"""pydantic's problems in the words of YAML."""

ConfigType = TypeVar("ConfigType", bound=BaseModel)

MAX_DEPTH = 32
MAX_VALUES = 1_000_000
"""Far beyond any config, and what an alias that holds itself, or ten that hold ten others each, soon passes."""


class ClusterConfig(Policy):
    """Where a run runs. None means: derived from what the cluster has."""

    address: str | None = None
    """Ray address; None uses $RAY_ADDRESS (set inside a submitted job), else starts Ray on this machine."""
    num_actors: Annotated[int, Field(ge=1)] | None = None
    """Encode actors, each with a replica of the VAE. None: one per GPU, or one per eight cores without GPUs."""
    gpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """None: 1 if the cluster has GPUs, else 0."""
    decode_children: Annotated[int, Field(ge=0)] | None = None
    """Decode processes per encode actor. None: the cores of an actor's share of its node, less one, at most 16; a
    quarter of them without GPUs. 0, which needs remote_decoders: one that takes only what failed elsewhere."""
    remote_decoders: Annotated[int, Field(ge=0)] = 0
    """Decode processes per encode actor on other nodes, besides. The run goes on without those that have no room, and
    when their nodes go."""
    remote_decode_resource: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_]*$")] = "decode"
    """The custom Ray resource by which nodes lend their cores for that; each remote decoder takes 1 of it and
    `decode.threads` cores."""
    max_attempts: Annotated[int, Field(ge=2)] = 3
    """A shard that was begun this often without an end is not tried again. From the second time on it runs alone in
    its actor, so that only its own end counts."""
    on_poison_shard: Literal["stop", "set_aside"] = "stop"
    """What becomes of the run then: it stops and names the shard, or goes on without it."""
    shard_timeout_minutes: Annotated[float, Field(ge=1)] = 240.0
    """Ray ends the run if nothing at all comes back for this long."""

    @model_validator(mode="after")
    def _something_decodes(self) -> Self:
        if self.decode_children == 0 and not self.remote_decoders:
            raise ValueError("cluster.decode_children: 0 needs cluster.remote_decoders, got 0")
        if self.remote_decode_resource in ("CPU", "GPU", "TPU", "memory", "object_store_memory"):
            raise ValueError(
                "cluster.remote_decode_resource: expected a custom resource, got Ray's own "
                f"{self.remote_decode_resource!r}"
            )
        return self


class LogConfig(Policy):
    """What a run writes to stderr, which is the log of a submitted job."""

    format: Literal["auto", "none", "key_value", "json"] = "auto"
    """A line for each shard that is committed, each rejection with its key and cause, and each warning. auto:
    key_value, or none on a terminal, where a progress bar shows the run. none: warnings alone."""
    stalled_seconds: Annotated[float, Field(ge=10)] = 300.0
    """A warning names an encoder that has shards in work and has not moved for this long."""


class EncodeConfig(EncodeSettings):
    """configs/encode/*.yaml"""

    cluster: ClusterConfig = ClusterConfig()
    error_budget: ErrorBudget = ErrorBudget()
    log: LogConfig = LogConfig()


def load_config(model: type[ConfigType], path: Path | str, overrides: Sequence[str] = ()) -> ConfigType:
    """Read a YAML config, apply `a.b=value` overrides (values are YAML), validate.

    ConfigError names the file, the setting, what was expected and what was given; an unknown setting comes with the
    nearest known one.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config {path} does not exist (relative paths start at {Path.cwd()})") from error
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a path with a NUL
        raise ConfigError(f"config {path}: {error}") from error
    raw = _parse(text, f"config {path}: it")
    if not isinstance(raw, dict):
        raise ConfigError(f"config {path}: expected a mapping of settings, got {type(raw).__name__}")
    return validate_config(model, raw, f"config {path}", overrides)


def validate_config(
    model: type[ConfigType], raw: dict[str, Any], where: str, overrides: Sequence[str] = ()
) -> ConfigType:
    """Settings from anywhere, with overrides; `raw` is changed by them. ConfigErrors begin with `where`."""
    for override in overrides:
        _apply(raw, override)
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}:\n  " + "\n  ".join(_problems(model, error))) from error


def vae_named(text: str, *, seed: int = 0) -> VAESource:
    """What --vae says: the name of a spec, whose weights are random from `seed`, or a checkpoint's path or URL."""
    try:
        return VAESource.model_validate({"spec": text, "seed": seed} if text in SPECS else {"checkpoint": text})
    except ValidationError as error:
        raise ConfigError(f"--vae {text}: {error.errors()[0]['msg']}") from error


def _parse(text: str, where: str) -> Any:
    """YAML as plain values; ConfigError if it is none, or nests or repeats beyond all reason."""
    try:
        value = yaml.safe_load(text)
    # PyYAML's own constructors let pass what they meet in "2001-99-99", "!!timestamp x" or an integer of 5,000 digits
    except (yaml.YAMLError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise ConfigError(f"{where} is not YAML: {error}") from error
    level, left = [value], MAX_VALUES
    for _ in range(MAX_DEPTH):
        left -= len(level)
        level = list(islice((inner for one in level for inner in _inside(one)), left + 1))
        if len(level) > left:
            raise ConfigError(f"{where} holds over {MAX_VALUES:,} values; do its aliases repeat each other?")
    if level:
        raise ConfigError(f"{where} nests over {MAX_DEPTH} deep; does an alias hold itself?")
    return value


def _inside(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set):
        yield from value


def _apply(raw: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    if not separator or not all(name.split(".")):
        raise ConfigError(f"--set: expected section.setting=value, got {override!r}")
    value = _parse(text, f"--set {name}: value")
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
    if problem["type"] == "union_tag_invalid":
        context = problem["ctx"]
        return f"{where}.kind: expected one of {context['expected_tags']}, got {_shown(context['tag'])}"
    if problem["type"] == "value_error":  # our own: they say what they got, and some of them where
        message = problem["msg"].removeprefix("Value error, ")
        return message if message.startswith(f"{where}.") else f"{where}: {message}"
    message = str(_EXPECTED.get(problem["type"], problem["msg"]))
    if isinstance(problem["input"], dict):  # may hold a credential
        quotes = '; a text that begins with { needs quotes: "{column}"' if problem["type"] == "string_type" else ""
        return f"{where}: {message}{quotes}"
    if problem["type"] == "tuple_type" and path[-1].isdecimal():
        message += " (a list of lists, such as [[96, 160]])"
    return f"{where}: {message}" + ("" if problem["type"] == "missing" else f", got {_shown(problem['input'])}")


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
