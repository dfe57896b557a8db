"""Checkpoints of a run: all tensors in one safetensors file, the rest in a JSON document that commits it.

    checkpoints/00001000-1f2e3d4c.safetensors   weights, moving average, discriminator, optimizers
    checkpoints/00001000.json                   step, positions in the data, figures, sha256 of that file

The document is written last, so a checkpoint is there whole or not at all, on any store. Nothing is pickled.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from cvvae.weights import file_sha256
from pipeline.errors import DatasetError
from pipeline.storage import Store

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
STATE_FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """A run between two steps."""

    step: int
    """Steps done."""
    tensors: dict[str, Tensor]
    document: dict[str, Any]
    """All that is no tensor, as JSON."""


def save_state(store: Store, state: TrainState) -> None:
    """Write a checkpoint. One of the same step is replaced. StorageError."""
    with tempfile.TemporaryDirectory(prefix="train-state-") as folder:
        path = Path(folder) / "state.safetensors"
        safetensors.torch.save_file({name: _plain(value) for name, value in state.tensors.items()}, path)
        digest = file_sha256(path)
        name = f"{state.step:08d}-{digest[:8]}.safetensors"
        store.create(f"{FOLDER}/{name}", path)
    document = {"format": STATE_FORMAT, "step": state.step, "tensors": name, "sha256": digest, **state.document}
    store.replace(_document_name(state.step), json.dumps(document, indent=1).encode())
    for other in list(store.names(FOLDER, ".safetensors")):  # of an attempt that was cut off before its document
        if other.startswith(f"{state.step:08d}-") and other != name:
            store.remove(f"{FOLDER}/{other}")


def saved_steps(store: Store) -> list[int]:
    """The steps of the checkpoints that are whole, ascending."""
    return [int(Path(name).stem) for name in store.names(FOLDER, ".json")]


def load_latest(store: Store) -> TrainState | None:
    """The newest checkpoint that can be read, on the CPU; None if there is none. DatasetError if all are damaged."""
    steps = saved_steps(store)
    for step in reversed(steps):
        try:
            return load_state(store, step)
        except DatasetError as error:
            log.warning("checkpoint left out: %s", error)
    if steps:
        raise DatasetError(f"{store.full_url(FOLDER)}: none of its {len(steps)} checkpoints can be read")
    return None


def load_state(store: Store, step: int) -> TrainState:
    """The checkpoint of that step. DatasetError if its file is missing, damaged, or of another format."""
    name = _document_name(step)
    document = json.loads(store.read_bytes(name))
    if document.get("format") != STATE_FORMAT:
        got = document.get("format")
        raise DatasetError(f"{store.full_url(name)}: expected checkpoint format {STATE_FORMAT}, got {got!r}")
    tensors_name = f"{FOLDER}/{document['tensors']}"
    with tempfile.TemporaryDirectory(prefix="train-state-") as folder:
        try:
            path = store.local_file(tensors_name, Path(folder))
            digest = file_sha256(path)
            if digest != document["sha256"]:
                raise DatasetError(
                    f"{store.full_url(tensors_name)}: expected sha256 {document['sha256']}, got {digest}"
                )
            # read into memory: the file may be gone when the first tensor is used
            tensors = safetensors.torch.load(path.read_bytes())
        except (FileNotFoundError, SafetensorError) as error:
            raise DatasetError(f"{store.full_url(tensors_name)}: {error}") from error
    return TrainState(step=step, tensors=tensors, document=document)


def prune(store: Store, *, keep_last: int, best: int | None) -> None:
    """Remove all but the newest `keep_last` checkpoints and the best one's; the document goes first."""
    steps = saved_steps(store)
    kept = {*steps[-keep_last:], *([best] if best is not None else [])}
    for step in steps:
        if step not in kept:
            store.remove(_document_name(step))
    names = {f"{step:08d}" for step in kept}
    for name in list(store.names(FOLDER, ".safetensors")):
        if name.partition("-")[0] not in names:
            store.remove(f"{FOLDER}/{name}")


def _document_name(step: int) -> str:
    return f"{FOLDER}/{step:08d}.json"


def _plain(value: Tensor) -> Tensor:
    return value.detach().cpu().contiguous()


def optimizer_tensors(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, Tensor]:
    """An optimizer's state under names: PREFIX.NUMBER.FIELD."""
    return {
        f"{prefix}.{number}.{field}": value
        for number, fields in optimizer.state_dict()["state"].items()
        for field, value in fields.items()
    }


@torch.no_grad()
def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """What `optimizer_tensors` gave; the groups' settings stay those of the config."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in with_prefix(tensors, prefix).items():
        number, _, field = name.partition(".")
        like = parameters[int(number)]
        # in the parameter's own memory layout, or the update takes a slower way
        own = value if value.shape != like.shape else torch.empty_like(like).copy_(value)
        state.setdefault(int(number), {})[field] = own
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors named PREFIX.NAME, by NAME."""
    return {
        name.removeprefix(f"{prefix}."): value for name, value in tensors.items() if name.startswith(f"{prefix}.")
    }


def named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inverse of `with_prefix`."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}
