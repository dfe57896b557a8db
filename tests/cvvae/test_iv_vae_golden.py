"""The numbers and key tables of the authors' modules: tests/golden/ivvae_*."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, seeded_vae
from cvvae.iv_vae import IVVAE

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {"ivvae_z4_dim8": "ivvae-z4-tiny", "ivvae_z16_dim12": "ivvae-z16-tiny"}
CASES = [(stem, case) for stem in MODELS for case in json.loads((GOLDEN / f"{stem}.json").read_text())["cases"]]


def assert_near(got, expected, *, max_abs, rel_rms):
    difference = got - expected
    assert got.shape == expected.shape
    assert difference.abs().max() <= max_abs
    assert difference.square().mean().sqrt() <= rel_rms * expected.square().mean().sqrt()


def load(stem, case):
    description = json.loads((GOLDEN / f"{stem}.json").read_text())
    with np.load(GOLDEN / f"{stem}.npz") as arrays:
        tensors = [torch.from_numpy(arrays[f"{case}/{name}"]) for name in ("video", "moments", "latent", "decoded")]
    return seeded_vae(SPECS[MODELS[stem]], description["weights_seed"]), *tensors


@pytest.mark.parametrize("with_gradients", [False, True])  # which choose between two ways of convolving
@pytest.mark.parametrize(("stem", "case"), CASES)
def test_moments_and_pixels_are_the_authors(stem, case, with_gradients):
    vae, video, moments, latent, decoded = load(stem, case)
    with torch.set_grad_enabled(with_gradients):
        posterior = vae.encode(video)
        got_decoded = vae.decode(vae.denormalize(latent))
    assert_near(torch.cat([posterior.mean, posterior.logvar], 1).detach(), moments, max_abs=2e-4, rel_rms=1e-5)
    assert_near(vae.normalize(posterior.mean).detach(), latent, max_abs=2e-4, rel_rms=1e-5)
    assert_near(got_decoded.detach(), decoded, max_abs=1e-3, rel_rms=5e-5)


PARAMETERS = {
    "ivvae-z4-dim64": 107_170_842,
    "ivvae-z8-dim64": 107_379_150,
    "ivvae-z16-dim64": 107_798_550,
    "ivvae-z16-dim96": 241_854_742,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_keys_shapes_and_parameter_counts_are_the_checkpoints(name):
    table = json.loads((GOLDEN / "ivvae_state_dict_keys.json").read_text())[name.replace("-", "_")]
    with torch.device("meta"):
        vae = IVVAE(SPECS[name])
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == table
    assert sum(parameter.numel() for parameter in vae.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "scale", "shift"),
    [
        ("ivvae-z4-dim64", 1.3196, 0.1250),
        ("ivvae-z8-dim64", 1.0940, -0.0322),
        ("ivvae-z16-dim64", 0.9697, -0.1553),
        ("ivvae-z16-dim96", 0.7619, -0.0483),
    ],
)
def test_scale_and_shift_are_the_authors(name, scale, shift):
    assert (SPECS[name].scaling_factor, SPECS[name].shift_factor) == (scale, shift)
