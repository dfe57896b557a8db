"""Weights in and out: released checkpoints, seeded ones for tests and demos, and the hash that names them.

Nothing here unpickles: safetensors, or torch.load(weights_only=True). Matching is strict: every key, every shape.
"""

import hashlib
import json
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from cvvae.families import FAMILIES, family_of, spec_of_config, spec_of_tensors
from cvvae.spec import VAESpec
from cvvae.vae import VideoVAE

CONFIG_NAME = "config.json"
WEIGHTS_NAMES = tuple(sorted({family.weights_name for family in FAMILIES.values()}))
PICKLE_SUFFIXES = (".ckpt", ".pth", ".pt")

_LISTED = 10
_UNREADABLE = (
    # the unpickler of torch meets bytes that are no pickle with whatever they lead it to
    *(pickle.UnpicklingError, EOFError, LookupError, ValueError, TypeError, RuntimeError),
    SafetensorError,
)


def load_vae(
    path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> VideoVAE:
    """A released VAE in eval mode, its weights converted from the stored dtype to `dtype`.

    `path` is a directory with config.json and diffusion_pytorch_model.safetensors or model.safetensors, a directory
    with one .ckpt, or a .ckpt, .pth or .safetensors file. Without a config.json in the directory the model is
    recognised from keys and shapes, and the tile plan and scale are the family's own. Of a training state only the
    model is taken, its moving average if it has one. ValueError if the config is not supported or keys and shapes do
    not match exactly; FileNotFoundError.
    """
    config_file, weight_file = _find_files(Path(path))
    digest = weights_sha256(weight_file)
    tensors = read_tensors(weight_file)
    if config_file is None:
        spec = spec_of_tensors(tensors, where=str(weight_file))
    else:
        spec = spec_of_config(read_config(config_file), where=str(config_file))
        tensors = family_of(spec).with_known_keys(tensors)
        spec = family_of(spec).spec_with_tensors(spec, tensors, where=str(weight_file))
    with torch.device("meta"):  # no memory and no time for an initialisation that is overwritten
        vae = _construct(spec)
    check_tensors(tensors, vae, where=str(weight_file), constants=family_of(spec).constants(spec))
    converted = {key: tensors.pop(key).to(device=device, dtype=dtype) for key in vae.state_dict()}
    vae.load_state_dict(converted, assign=True)
    vae.weights_sha256 = digest
    return vae.use_memory_format(torch.channels_last_3d).eval()


def build_vae(spec: VAESpec) -> VideoVAE:
    """A model of that spec with PyTorch's random initialisation (global generator), on the CPU in fp32, eval mode."""
    return _construct(spec).use_memory_format(torch.channels_last_3d).eval()


def seeded_vae(spec: VAESpec, seed: int) -> VideoVAE:
    """`build_vae` with weights that follow from (key, seed) alone, the same on every machine: for tests and demos.

    Full-width models take seconds: 180 M draws. `weights_sha256` is that of the tensors.
    """
    with torch.device("meta"):
        vae = _construct(spec)
    values = {key: _seeded_tensor(key, tuple(like.shape), seed) for key, like in vae.state_dict().items()}
    vae.load_state_dict(values, assign=True)
    vae.weights_sha256 = weights_sha256(vae)
    return vae.use_memory_format(torch.channels_last_3d).eval()


def save_vae(vae: VideoVAE, directory: str | os.PathLike[str]) -> Path:
    """Writes config.json and the weights (safetensors) as the authors do; `load_vae` reads them back.

    The stored dtype is the model's. Each file appears complete or not at all, the config last.
    """
    target = Path(directory)
    family = family_of(vae.spec)
    config = family.config_from_spec(vae.spec)
    target.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in vae.state_dict().items()}
    tensors.update(family.constants(vae.spec))
    weight_part, config_part = target / f".{family.weights_name}.tmp", target / f".{CONFIG_NAME}.tmp"
    config_part.write_text(json.dumps(config, indent=2) + "\n")
    safetensors.torch.save_file(tensors, weight_part, metadata={"format": "pt"})
    weight_part.chmod(config_part.stat().st_mode & 0o777)  # safetensors writes for its owner only
    weight_part.replace(target / family.weights_name)
    config_part.replace(target / CONFIG_NAME)
    return target


def weights_sha256(source: str | os.PathLike[str] | nn.Module) -> str:
    """Hex sha256 that names weights: of the weight file's bytes, as model hubs list it, or of a module's tensors.

    A module's hash covers key, dtype, shape and bytes in key order, so it ignores memory layout and device. The two
    kinds differ for the same weights: a file's hash also covers its container.
    """
    if not isinstance(source, nn.Module):
        return file_sha256(_find_files(Path(source))[1])
    digest = hashlib.sha256()
    for key, tensor in sorted(source.state_dict().items()):
        digest.update(f"{key}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        # flattened, because a 0-D tensor has no view of another item size
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(memoryview(data.numpy()))
    return digest.hexdigest()


def file_sha256(file: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_tensors(
    tensors: Mapping[str, Tensor], model: nn.Module, *, where: str, constants: Mapping[str, Tensor] | None = None
) -> None:
    """ValueError listing missing, unexpected and misshapen keys, each with its count and at most ten by name.

    `constants` are expected beside the model's own.
    """
    expected = {key: tuple(value.shape) for key, value in {**model.state_dict(), **(constants or {})}.items()}
    got = {key: tuple(value.shape) for key, value in tensors.items()}
    misshapen = [key for key in expected if key in got and got[key] != expected[key]]
    groups = {
        "missing": sorted(expected.keys() - got.keys()),
        "unexpected": sorted(got.keys() - expected.keys()),
        "of another shape": [f"{key} (expected {expected[key]}, got {got[key]})" for key in sorted(misshapen)],
    }
    lines = [f"{len(keys)} {what}: {_capped(keys)}" for what, keys in groups.items() if keys]
    if lines:
        raise ValueError(f"{where}: expected the {len(expected)} keys of the model, got\n  " + "\n  ".join(lines))


def _capped(keys: list[str]) -> str:
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f", and {rest} more" if rest > 0 else "")


def _construct(spec: VAESpec) -> VideoVAE:
    return family_of(spec).build(spec)


def _seeded_tensor(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    # RandomState, not Generator: its stream is frozen, so the golden outputs stay valid
    normal = np.random.RandomState((zlib.crc32(key.encode()) + seed) % 2**32).standard_normal(shape)
    if key.endswith(".bias"):
        values = 0.05 * normal
    elif len(shape) == 1 or key.endswith("gamma"):
        values = 1.0 + 0.1 * normal
    else:
        values = normal / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def _find_files(path: Path) -> tuple[Path | None, Path]:
    """(config.json or None, weight file) for what a user may name. A file named directly is read without a config."""
    if path.is_file():
        if path.suffix not in (".safetensors", *PICKLE_SUFFIXES):
            raise ValueError(f"{path}: expected a .safetensors, .ckpt, .pth or .pt file or a directory")
        return None, path
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a checkpoint file or directory, found nothing there")
    config_file = path / CONFIG_NAME
    weight_file = next((path / name for name in WEIGHTS_NAMES if (path / name).is_file()), None)
    if weight_file is None:
        pickled = sorted(file for file in path.iterdir() if file.suffix in PICKLE_SUFFIXES)
        if len(pickled) != 1:
            raise ValueError(
                f"{path}: expected {' or '.join(WEIGHTS_NAMES)} or exactly one .ckpt, .pth or .pt file, "
                f"got {[file.name for file in pickled]}"
            )
        weight_file = pickled[0]
    return (config_file if config_file.is_file() else None), weight_file


def read_config(file: Path) -> dict[str, Any]:
    """A config.json. ValueError if it is no JSON object."""
    try:
        config = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got an error at {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(config).__name__}")
    return config


def read_tensors(file: Path) -> dict[str, Tensor]:
    """All tensors of a weight file that belong to a model: training-only ones (loss, frozen 2-D decoder) left out."""
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(
            f"{file}: expected a readable file of tensors (objects of other classes are not loaded), got: {error}"
        ) from error
    if not isinstance(state, Mapping):
        raise ValueError(f"{file}: expected a state dict, bare or under 'state_dict', got {type(state).__name__}")
    training_only = ("loss.", "constraint_")
    return {
        key: value
        for key, value in _model_state(state).items()
        if isinstance(value, Tensor) and not key.startswith(training_only)
    }


def _model_state(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's tensors in a training state: their moving average, or under 'state_dict', there perhaps beside a
    discriminator's."""
    average = state.get("ema_state_dict")
    if isinstance(average, Mapping) and average:
        return {key.removeprefix("module."): value for key, value in average.items()}
    for name in ("state_dict", "gen_model"):
        inner = state.get(name)
        if isinstance(inner, Mapping):
            state = inner
    return state
