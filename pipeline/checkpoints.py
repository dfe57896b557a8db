"""Bring a VAE checkpoint to local disk, once per node, and load it."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from filelock import FileLock
from pydantic import Field, model_validator

from cvvae import SPECS, VideoVAE, load_vae, seeded_vae
from cvvae.shipped import shipped_checkpoint
from pipeline.errors import ConfigError, StorageError
from pipeline.policies import Policy, PublicUrl, StoreOptions
from pipeline.storage import open_url
from pipeline.store_errors import client_errors, redact

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "model.safetensors")
SHIPPED_SCHEME = "shipped://"
CHECKPOINT_SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt")


class VAESource(Policy):
    """Which VAE to use: a published checkpoint, or seeded weights of a named spec for demos and tests."""

    checkpoint: PublicUrl | None = None
    """A folder with config.json and safetensors, or a .ckpt file: a local path, any fsspec URL,
    hf://OWNER/REPOSITORY/FOLDER, or shipped://tiny-cvvae, which comes with this project."""
    spec: str | None = None
    """Name of a literal spec; its weights are random, made from `seed`. They encode nothing meaningful."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of those random weights."""
    options: StoreOptions
    """fsspec options of the checkpoint's store; no credentials."""

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.checkpoint is None) == (self.spec is None):
            raise ValueError(
                "expected either vae.checkpoint or vae.spec, got " + ("both" if self.spec else "neither")
            )
        if self.spec is not None and self.spec not in SPECS:
            raise ValueError(f"vae.spec: expected one of {sorted(SPECS)}, got {self.spec!r}")
        return self

    @property
    def is_seeded(self) -> bool:
        return self.spec is not None


def load_source(source: VAESource, *, cache: Path | None = None) -> VideoVAE:
    """The VAE in float32 on the CPU. ConfigError if the checkpoint, or a package it needs, is missing or wrong."""
    if source.spec is not None:
        try:
            return seeded_vae(SPECS[source.spec], source.seed)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"vae.spec: {error}") from error
    assert source.checkpoint is not None
    path = fetch_checkpoint(source.checkpoint, source.options, cache=cache)
    try:
        return load_vae(path, dtype=torch.float32)
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"vae.checkpoint: {error}") from error


def cache_folder() -> Path:
    """Where checkpoints are kept: $LATENTS_CACHE, else the user's cache folder."""
    configured = os.environ.get("LATENTS_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(configured) if configured else Path(base) / "cvvae-latents"


def fetch_checkpoint(url: str, options: dict[str, Any] | None = None, *, cache: Path | None = None) -> Path:
    """A local path of a checkpoint; a remote one is copied to the cache under a lock, whole or not at all.

    The cache's name for it holds the sizes and ETags of its files, so that a replaced checkpoint is fetched anew.
    """
    if url.startswith(SHIPPED_SCHEME):
        try:
            return shipped_checkpoint(url.removeprefix(SHIPPED_SCHEME))
        except ValueError as error:
            raise ConfigError(f"vae.checkpoint: {url}: {error}") from error
    if "://" not in url:
        path = Path(url).expanduser()
        if not path.exists():
            raise ConfigError(f"vae.checkpoint: {url} does not exist (relative paths start at {Path.cwd()})")
        return path
    try:
        fs, root = open_url(url, options)
        fs.invalidate_cache()  # a replaced checkpoint must be seen
        files = _wanted_files(fs, root)
    except FileNotFoundError as error:
        raise ConfigError(f"vae.checkpoint: {redact(url)} does not exist") from error
    except (ImportError, ValueError, StorageError, *client_errors()) as error:
        raise ConfigError(
            f"vae.checkpoint: cannot open {redact(url)}: {type(error).__name__}: {redact(str(error))}"
        ) from error
    if not files:
        raise ConfigError(f"vae.checkpoint: {url} holds no config.json with safetensors and no .ckpt")
    version = hashlib.sha256(repr((url, sorted(files.items()))).encode()).hexdigest()[:16]
    folder = (cache or cache_folder()) / f"{Path(root).name}-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            _download(fs, files, folder)
    return folder / Path(root).name if root in files else folder


def _wanted_files(fs: Any, root: str) -> dict[str, str]:
    """Remote path -> version, of config.json and the weights; one weight file, safetensors before .ckpt."""
    if root.endswith(CHECKPOINT_SUFFIXES):
        return {root: _version(fs.info(root))}
    entries = {entry["name"].rsplit("/", 1)[-1]: entry for entry in fs.ls(root, detail=True)}
    weights = [name for name in WEIGHT_FILES if name in entries][:1]
    weights = weights or [name for name in sorted(entries) if name.endswith(CHECKPOINT_SUFFIXES)][:1]
    chosen = [*weights, *(["config.json"] if "config.json" in entries else [])]
    return {entries[name]["name"]: _version(entries[name]) for name in chosen} if weights else {}


def _version(details: dict[str, Any]) -> str:
    tags = (details.get(name) for name in ("size", "ETag", "etag", "blob_id", "sha", "mtime", "created"))
    return ":".join(str(tag) for tag in tags if tag is not None)


def _download(fs: Any, files: dict[str, str], folder: Path) -> None:
    for left in folder.parent.glob(f"{folder.name}.*.part"):  # by a killed process; we hold the lock
        shutil.rmtree(left, ignore_errors=True)
    staged = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}.part")
    staged.mkdir()
    try:
        for remote in files:
            fs.get_file(remote, str(staged / remote.rsplit("/", 1)[-1]))
        staged.rename(folder)
    except client_errors() as error:
        raise ConfigError(f"vae.checkpoint: fetching {', '.join(files)} broke off: {redact(str(error))}") from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
