"""Batches on a CUDA device: determinism and agreement with the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cvvae import SPECS, seeded_vae
from pipeline.encoder import TileEncoder
from pipeline.policies import EncodePolicy

pytestmark = pytest.mark.gpu


def encode(device: str, window: np.ndarray, policy: EncodePolicy) -> torch.Tensor:
    encoder = TileEncoder(seeded_vae(SPECS["cvvae-sd21-tiny"], 5), policy, torch.device(device))
    batcher = encoder.batcher()
    ((_, posterior),) = [*batcher.add(window, 0), *batcher.flush()]
    return posterior.mean


@pytest.mark.parametrize("compiled", [False, True])
def test_a_gpu_gives_the_cpus_numbers_and_the_same_twice(compiled: bool) -> None:
    window = np.random.default_rng(0).integers(0, 256, (33, 64, 64, 3), dtype=np.uint8)
    policy = EncodePolicy(batch_pixels=3 * 17 * 64 * 64, compile=compiled)
    first, second = (encode("cuda", window, policy) for _ in range(2))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, encode("cpu", window, EncodePolicy()), rtol=1e-3, atol=1e-3)


def test_float16_on_a_gpu_is_finite_and_near() -> None:
    window = np.random.default_rng(0).integers(0, 256, (17, 64, 64, 3), dtype=np.uint8)
    exact = encode("cuda", window, EncodePolicy())
    half = encode("cuda", window, EncodePolicy(dtype="float16"))
    assert float((half - exact).norm() / exact.norm()) < 0.01
