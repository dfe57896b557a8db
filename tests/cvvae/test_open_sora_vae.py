"""Open-Sora 1.2's VAE against the authors' numbers, key table and parameter counts; its rule of lengths."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, seeded_vae
from cvvae.open_sora_checkpoint import constants
from cvvae.open_sora_vae import OpenSoraSpec, OpenSoraVAE
from tests.cvvae.test_cvvae_golden import assert_near

GOLDEN = Path(__file__).parents[1] / "golden"
DESCRIPTION = json.loads((GOLDEN / "opensora12_small.json").read_text())
CASES = DESCRIPTION["cases"]
TINY = SPECS["open-sora-1.2-tiny"]
assert isinstance(TINY, OpenSoraSpec)


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "opensora12_small.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def vae():
    vae = seeded_vae(TINY, seed=DESCRIPTION["weights_seed"])
    assert isinstance(vae, OpenSoraVAE)
    return vae


@pytest.mark.parametrize("case", [name for name in CASES if not name.startswith("odd")])
def test_moments_and_pixels_are_the_authors(case, arrays, vae):
    video, moments, decoded = (arrays[f"{case}/{name}"] for name in ("video", "moments", "decoded"))
    vae.spec = replace(TINY, tile_frames=None) if CASES[case]["overrides"] else TINY
    with torch.inference_mode():
        posterior = vae.encode(video)
        got = torch.cat([posterior.mean, posterior.logvar], 1)
        assert_near(got, moments, max_abs=2e-4, rel_rms=1e-5)
        assert_near(vae.normalize(posterior.mean), arrays[f"{case}/latent"], max_abs=2e-4, rel_rms=1e-5)
        assert_near(vae.encode_frames(video), arrays[f"{case}/spatial"], max_abs=2e-4, rel_rms=1e-5)
        latent = vae.denormalize(arrays[f"{case}/latent"])
        assert_near(vae.decode(latent), decoded, max_abs=1e-3, rel_rms=5e-5)


@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("odd")])
def test_lengths_that_latents_do_not_tell_are_refused_but_can_be_computed(case, arrays, vae):
    video, moments, decoded = (arrays[f"{case}/{name}"] for name in ("video", "moments", "decoded"))
    vae.spec = TINY
    with pytest.raises(ValueError, match=r"expected 17\*n, or 1 \+ 4\*k frames more, .* the nearest shorter is"):
        vae.encode(video)
    tiles = TINY.encode_tiles(video.shape[2])
    with torch.inference_mode():
        parts = [vae._encode_moments(video[:, :, tile.start : tile.stop]) for tile in tiles]
        means = [part.chunk(2, 1)[0] for part in parts]
        pixels = [vae.decode_clip(z, num_frames=tile.num_frames) for z, tile in zip(means, tiles, strict=True)]
    assert_near(torch.cat(parts, 2), moments, max_abs=2e-4, rel_rms=1e-5)
    assert_near(torch.cat(pixels, 2), decoded, max_abs=1e-3, rel_rms=5e-5)


def test_a_wrong_number_of_frames_does_not_pass_when_decoding_a_clip(vae):
    with pytest.raises(ValueError, match="expected 5 latent frames for num_frames=17, got 4"):
        vae.decode_clip(torch.zeros(1, 4, 4, 2, 2), num_frames=17)


def test_keys_shapes_and_parameter_counts_are_the_checkpoints():
    table = json.loads((GOLDEN / "opensora12_state_dict_keys.json").read_text())
    spec = SPECS["open-sora-1.2"]
    assert isinstance(spec, OpenSoraSpec)
    with torch.device("meta"):
        vae = OpenSoraVAE(spec)
    held = {**vae.state_dict(), **constants(spec)}
    assert {key: list(value.shape) for key, value in held.items()} == table
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae, vae.spatial_vae, vae.temporal_vae)]
    assert counts == [393_341_007, 83_653_863, 309_687_144]


def test_lengths_and_latents_are_those_the_authors_code_gives():
    assert [n for n in range(1, 40) if TINY.is_valid_num_frames(n)] == [1, 5, 9, 13, 17, 18, 22, 26, 30, 34, 35, 39]
    latents = {1: 1, 5: 2, 17: 5, 18: 6, 34: 10, 35: 11, 51: 15, 52: 16, 68: 20, 102: 30}
    assert {n: TINY.num_latent_frames(n) for n in latents} == latents
    assert {n: TINY.num_video_frames(t) for n, t in latents.items()} == {n: n for n in latents}
    assert [TINY.frame_span(j) for j in (0, 1, 4, 5, 6)] == [(0, 1), (1, 5), (13, 17), (17, 18), (18, 22)]
    assert TINY.largest_valid_num_frames(21) == 18


def test_one_clip_whatever_the_length():
    spec = replace(TINY, tile_frames=None)
    assert [n for n in range(1, 40) if spec.is_valid_num_frames(n)] == list(range(1, 40, 4))
    assert spec.num_latent_frames(33) == 9
    assert spec.num_video_frames(9) == 33
    assert spec.frame_span(8) == (29, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_frames": 16}, r"tile_frames: expected 1 \+ 4\*k or None, got 16"),
        ({"tile_size": 256}, "tile_size: expected None"),
        ({"widths": (32, 64, 64)}, "space_stride: expected 4, 4 for 3 widths, got 4, 8"),
        ({"widths": (32, 64, 64, 65)}, "widths: expected positive multiples of 32"),
        ({"temporal_widths": (32, 64, 64)}, "temporal_widths: expected 4 of them"),
        ({"scaling_factor": (1.0, 2.0)}, "scaling_factor: expected one number or one per latent channel"),
    ],
)
def test_specs_that_no_network_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
