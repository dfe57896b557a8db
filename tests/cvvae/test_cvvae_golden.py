"""The numbers of the authors' modules: tests/golden, described in its .json files."""

import json
from pathlib import Path

import pytest
import torch

from cvvae import SPECS
from cvvae.cv_vae import CVVAE

GOLDEN = Path(__file__).parents[1] / "golden"
MODELS = {
    "cvvae_sd21_ch32": "cvvae-sd21-tiny",
    "cvvae_sd21_full3d_ch32": "cvvae-sd21-full3d-tiny",
    "cvvae_sd3_ch32": "cvvae-sd3-tiny",
}
CASES = [(stem, case) for stem in MODELS for case in json.loads((GOLDEN / f"{stem}.json").read_text())["cases"]]


def assert_near(got, expected, *, max_abs, rel_rms):
    difference = got - expected
    assert got.shape == expected.shape
    assert difference.abs().max() <= max_abs
    assert difference.square().mean().sqrt() <= rel_rms * expected.square().mean().sqrt()


@pytest.mark.parametrize(("stem", "case"), CASES)
def test_moments_and_pixels_are_the_authors(stem, case, load_golden):
    golden = load_golden(stem, case, MODELS[stem])
    with torch.inference_mode():
        posterior = golden.vae.encode(golden.video)
        decoded = golden.vae.decode(golden.moments.chunk(2, dim=1)[0])
    assert_near(torch.cat([posterior.mean, posterior.logvar], 1), golden.moments, max_abs=2e-4, rel_rms=1e-5)
    assert_near(decoded, golden.decoded, max_abs=1e-3, rel_rms=5e-5)


@pytest.mark.parametrize("name", ["cvvae-sd21", "cvvae-sd21-full3d", "cvvae-sd3"])
def test_keys_and_shapes_are_the_checkpoints(name):
    table = json.loads((GOLDEN / "cvvae_state_dict_keys.json").read_text())[name.replace("-", "_")]
    with torch.device("meta"):
        vae = CVVAE(SPECS[name])
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == table


@pytest.mark.parametrize(
    ("name", "encoder", "decoder"),
    [
        ("cvvae-sd21", 68_748_936, 113_697_539),
        ("cvvae-sd21-full3d", 100_009_608, 155_869_955),
        ("cvvae-sd3", 69_080_736, 112_811_779),
    ],
)
def test_parameter_counts_are_the_papers(name, encoder, decoder):
    with torch.device("meta"):
        vae = CVVAE(SPECS[name])
    counts = [sum(p.numel() for p in half.parameters()) for half in (vae.encoder, vae.decoder)]
    assert counts == [encoder, decoder]
