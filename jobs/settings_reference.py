"""Every setting of a config, as docs/config.md: made from the models, so that it cannot fall behind.

latents settings > docs/config.md
latents settings finetune > docs/finetune-config.md
"""

from __future__ import annotations

import inspect
import json
import re
import sys
import types
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from annotated_types import Ge, Gt, Le, MinLen
from pydantic import BaseModel
from pydantic.fields import FieldInfo

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.config import EncodeConfig
from jobs.finetune_config import FinetuneConfig

HEAD = """\
# Settings

Every setting of `configs/encode/*.yaml`. Made by `latents settings`; a test compares.

A setting can be overridden on the command line, with a YAML value: `--set windows.frames=33`. An unknown setting is
an error. Relative local paths start at the folder the job is started in. Quote templates with braces:
`uri: "{path}"`. Credentials never stand in a config: [storage.md](storage.md).
"""

FINETUNE_HEAD = """\
# Settings of the finetune job

Every setting of `configs/finetune/*.yaml`. Made by `latents settings finetune`; a test compares. How they work
together: [finetune.md](finetune.md). `--set` and paths: as in [config.md](config.md).
"""


class Job(StrEnum):
    """The jobs that have a config."""

    ENCODE = "encode"
    FINETUNE = "finetune"


def settings(job: Annotated[Job, typer.Argument(help="Whose config.")] = Job.ENCODE) -> None:
    """Print every setting of a config, with its default and meaning."""
    print(reference() if job is Job.ENCODE else finetune_reference(), end="")


def reference() -> str:
    """The text of docs/config.md."""
    return "\n".join([HEAD, *_sections(EncodeConfig)])


def finetune_reference() -> str:
    """The text of docs/finetune-config.md."""
    return "\n".join([FINETUNE_HEAD, *_sections(FinetuneConfig)])


def _sections(config: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in config.model_fields.items():
        for model in _models_in(field.annotation):
            kind = model.model_fields.get("kind")
            is_one_of_several = kind is not None and len(get_args(kind.annotation)) == 1
            title = f"## `{prefix}{name}`"
            yield title + (f" with `kind: {kind.default}`" if kind is not None and is_one_of_several else "") + "\n"
            if model.__doc__:
                yield inspect.cleandoc(model.__doc__) + "\n"
            yield "| setting | type | default | meaning |\n|---|---|---|---|"
            yield from (_row(f"{prefix}{name}.{setting}", each) for setting, each in model.model_fields.items())
            yield ""
            yield from _sections(model, f"{prefix}{name}.")


def _row(name: str, field: FieldInfo) -> str:
    default = "required" if field.is_required() else f"`{_yaml(field.get_default(call_default_factory=True))}`"
    meaning = re.sub(r"\bNone\b", "`null`", " ".join((field.description or "").split()))
    return f"| `{name}` | {_type(field.annotation)}{_bounds(field.metadata)} | {default} | {meaning} |"


def _yaml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _type(annotation: Any) -> str:
    """How a YAML value of this type is called."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0]) + _bounds(arguments[1:])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type(part) for part in arguments)
    if origin is tuple:
        inner = [part for part in arguments if part is not Ellipsis]
        return f"list of {_type(inner[0])}" if Ellipsis in arguments else f"[{', '.join(map(_type, inner))}]"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, "mapping")


def _bounds(metadata: Any) -> str:
    limits = [limit for each in metadata for limit in getattr(each, "metadata", [each])]
    texts = [text for limit in limits if (text := _bound(limit))]
    return f" ({', '.join(texts)})" if texts else ""


def _bound(limit: Any) -> str | None:
    match limit:
        case Ge(ge=low):
            return f">= {low}"
        case Gt(gt=low):
            return f"> {low}"
        case Le(le=high):
            return f"<= {high}"
        case MinLen():
            return "not empty"
    return None


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)


if __name__ == "__main__":
    typer.run(settings)
