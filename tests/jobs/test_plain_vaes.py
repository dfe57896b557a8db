"""The benchmarks' yardstick gives the authors' numbers, so that a ratio against it is a ratio between equals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, seeded_vae
from jobs.bench_encode import GOLDEN_MAX, GOLDEN_RMS
from jobs.measure_precision import difference, smooth_video
from jobs.plain_cv_vae import PlainCVVAE
from jobs.plain_iv_vae import PlainIVVAE
from jobs.plain_vae import plain_vae

GOLDEN = Path(__file__).parents[1] / "golden"
# one tile in time and space: cutting is not the yardstick's business
CASES = [
    ("cvvae_sd21_ch32", "cvvae-sd21-tiny", "image"),
    ("cvvae_sd21_ch32", "cvvae-sd21-tiny", "clip17"),
    ("cvvae_sd21_full3d_ch32", "cvvae-sd21-full3d-tiny", "clip9"),
    ("cvvae_sd3_ch32", "cvvae-sd3-tiny", "clip5"),
    ("cvvae_sd3_ch32", "cvvae-sd3-tiny", "clip17"),
]


@pytest.mark.parametrize(("stem", "spec", "case"), CASES)
def test_numbers_are_the_authors(stem: str, spec: str, case: str) -> None:
    seed = json.loads((GOLDEN / f"{stem}.json").read_text())["weights_seed"]
    plain = PlainCVVAE(SPECS[spec], seeded_vae(SPECS[spec], seed).state_dict())
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        video, moments, decoded = (torch.from_numpy(arrays[f"{case}/{x}"]) for x in ("video", "moments", "decoded"))
    got = plain.encode_tile(video)
    mean, logvar = got.chunk(2, dim=1)
    relative, largest = difference(torch.cat([mean, logvar.clamp(-30, 20)], dim=1), moments)
    assert got.shape == moments.shape
    assert relative <= GOLDEN_RMS
    assert largest <= GOLDEN_MAX
    relative, largest = difference(plain.decode_tile(moments.chunk(2, dim=1)[0]), decoded)
    assert relative <= 5e-5
    assert largest <= 1e-3


def test_the_project_gives_the_same_numbers_at_a_real_size() -> None:
    """Rounding grows with the positions that a norm adds up: the reference cases are too small to show it."""
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], 0)
    video = smooth_video(17, 128, 128, seed=0)
    with torch.inference_mode():
        got = vae.encode_tile(video)
    relative, largest = difference(got, PlainCVVAE(vae.spec, vae.state_dict()).encode_tile(video))
    assert relative <= GOLDEN_RMS
    assert largest <= GOLDEN_MAX


def test_half_precision_stays_half_precision() -> None:
    spec = SPECS["cvvae-sd21-tiny"]
    weights = {key: value.bfloat16() for key, value in seeded_vae(spec, 0).state_dict().items()}
    plain = PlainCVVAE(spec, weights)
    moments = plain.encode_tile(torch.zeros(1, 3, 5, 16, 16, dtype=torch.bfloat16))
    assert moments.dtype == torch.bfloat16
    assert plain.decode_tile(moments.chunk(2, dim=1)[0]).dtype == torch.bfloat16


OTHER_CASES = [("odvae_small", "od-vae-tiny", case) for case in ("image", "clip5", "clip17")] + [
    ("opensora12_small", "open-sora-1.2-tiny", case) for case in ("image", "clip5", "clip17")
]


@pytest.mark.parametrize(("stem", "spec", "case"), OTHER_CASES)
def test_the_peers_moments_are_their_authors(stem: str, spec: str, case: str) -> None:
    seed = json.loads((GOLDEN / f"{stem}.json").read_text())["weights_seed"]
    plain = plain_vae(SPECS[spec], seeded_vae(SPECS[spec], seed).state_dict())
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        video, moments = (torch.from_numpy(arrays[f"{case}/{x}"]) for x in ("video", "moments"))
    mean, logvar = plain.encode_tile(video).chunk(2, dim=1)
    relative, largest = difference(torch.cat([mean, logvar.clamp(-30, 20)], dim=1), moments)
    assert relative <= GOLDEN_RMS
    assert largest <= GOLDEN_MAX


@pytest.mark.parametrize("name", ["ivvae-z4-tiny", "ivvae-z16-tiny"])
def test_the_plain_transcription_has_the_models_numbers(name: str) -> None:
    vae = seeded_vae(SPECS[name], 1)
    plain = PlainIVVAE(vae.spec, vae.state_dict())
    video = smooth_video(9, 16, 24, seed=0)
    with torch.inference_mode():
        posterior = vae.encode(video)
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1)
        assert difference(moments, plain.encode_tile(video))[0] < 1e-5
        assert difference(vae.decode(posterior.mean), plain.decode_tile(posterior.mean))[0] < 1e-5


def test_the_plain_transcription_is_of_the_published_model_only() -> None:
    with pytest.raises(ValueError, match="expected an IV-VAE as published"):
        PlainIVVAE(SPECS["ivvae-baseline-tiny"], {})


def test_other_models_are_refused() -> None:
    with pytest.raises(ValueError, match="strides 4 and 8"):
        PlainCVVAE(replace(SPECS["cvvae-sd21-tiny"], time_stride=2), {})
