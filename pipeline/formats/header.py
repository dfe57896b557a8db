"""What a shard says of itself, so that it can be read without the dataset around it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import Field

from pipeline.documents import FORMAT_VERSION, Document

HEADER_KEY = "CVVAE.header"
"""PAX global header record of a tar, key-value metadata of a Parquet file."""


class ShardHeader(Document):
    """Carried by every shard and every index."""

    format_version: int = Field(default=FORMAT_VERSION, ge=1)
    shard_id: str
    fingerprint: str = Field(pattern=r"^[0-9a-f]+$")
    """Hex digest of the run identity."""
    numerics: dict[str, Any]
    """What decided the last bits of the numbers: JSON types only."""
    vae: dict[str, Any]
    """The VAE's spec, with scaling_factor, shift_factor and the strides: JSON types only."""
    latent_state: Literal["raw"] = "raw"
    """Means and log variances as the VAE gives them: neither shifted nor scaled."""
    pixel_range: tuple[Literal[-1], Literal[1]] = (-1, 1)
    """What the VAE's input ranged over."""

    def to_json(self) -> str:
        return canonical_line(self.model_dump(mode="json"))


def canonical_line(value: Any) -> str:
    """One line of ASCII JSON that is a function of the value alone. ValueError for NaN and Inf.

    ASCII, since a lone surrogate is allowed in JSON but not in UTF-8, and sources do contain them.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def name_of(file: Path | BinaryIO) -> str:
    """What error messages call a file: its path, where it knows one."""
    if isinstance(file, Path):
        return str(file)
    for attribute in ("full_name", "name", "path"):
        name = getattr(file, attribute, None)
        if isinstance(name, str) and name:
            return name
    return "shard"
