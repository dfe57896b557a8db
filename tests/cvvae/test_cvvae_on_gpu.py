"""The same numbers on a CUDA device, and what half precision costs there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, seeded_vae

pytestmark = pytest.mark.gpu

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {"cvvae_sd21_ch32": "cvvae-sd21-tiny", "cvvae_sd3_ch32": "cvvae-sd3-tiny"}


@pytest.fixture(autouse=True)
def exact_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("case", ["image", "clip17", "tiled33"])
@pytest.mark.parametrize("golden", sorted(MODELS))
def test_golden_moments_in_float32(golden: str, case: str) -> None:
    arrays = np.load(GOLDEN / f"{golden}.npz")
    seed = json.loads((GOLDEN / f"{golden}.json").read_text())["weights_seed"]
    vae = seeded_vae(SPECS[MODELS[golden]], seed).to("cuda")
    with torch.inference_mode():
        posterior = vae.encode(torch.from_numpy(arrays[f"{case}/video"]).to("cuda"))
    expected = torch.from_numpy(arrays[f"{case}/moments"]).chunk(2, dim=1)[0]
    got = posterior.mean.cpu()
    assert (got - expected).abs().max() <= 2e-4
    assert (got - expected).norm() / expected.norm() <= 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.01), (torch.bfloat16, 0.05)])
def test_half_precision_is_near_float32(dtype: torch.dtype, bound: float) -> None:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(1, 3, 17, 64, 64, generator=generator).to("cuda") * 2 - 1
    with torch.inference_mode():
        exact = seeded_vae(SPECS["cvvae-sd21-tiny"], 0).to("cuda").encode(video).mean
        half = seeded_vae(SPECS["cvvae-sd21-tiny"], 0).to("cuda", dtype).encode(video.to(dtype)).mean
    relative = float((half.float() - exact).norm() / exact.norm())
    assert 0 < relative < bound
