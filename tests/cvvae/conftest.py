"""Shared by the model tests: the golden files and tiny seeded models, made once per session."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cvvae import SPECS, VideoVAE, seeded_vae

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(autouse=True)
def _one_thread():
    """Thread count decides last bits; and threads that wait for each other are slow where tests share a machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def sd21() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd21-tiny"], seed=11)


@pytest.fixture(scope="session")
def sd3() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd3-tiny"], seed=13)


@pytest.fixture(scope="session")
def video() -> Callable[..., torch.Tensor]:
    """video(B, T, H, W, seed=0) -> uniform noise in [-1, 1]."""

    def make(batch: int, num_frames: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.rand(batch, 3, num_frames, height, width, generator=generator) * 2 - 1

    return make


@dataclass(frozen=True)
class Golden:
    """One case: the authors' modules' input and outputs, and the spec and weights they were made with."""

    vae: VideoVAE
    video: torch.Tensor
    moments: torch.Tensor
    decoded: torch.Tensor


@pytest.fixture(scope="session")
def load_golden() -> Callable[[str, str, str], Golden]:
    """load_golden(file stem, case, spec name)"""

    def load(stem: str, case: str, spec_name: str) -> Golden:
        description: dict[str, Any] = json.loads((GOLDEN / f"{stem}.json").read_text())
        tile_size = description["cases"][case]["overrides"].get("tile_spatial_size", 576)
        spec = replace(SPECS[spec_name], tile_size=tile_size)
        with np.load(GOLDEN / f"{stem}.npz") as arrays:
            tensors = [torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("video", "moments", "decoded")]
        return Golden(seeded_vae(spec, seed=description["weights_seed"]), *tensors)

    return load
