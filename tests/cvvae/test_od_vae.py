"""OD-VAE against the authors' numbers, key table and parameter counts; its tile plan against a plain one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import seeded_vae
from cvvae.od_vae import ODVAE, ODVAE_SPECS, ODVAESpec
from tests.cvvae.test_cvvae_golden import assert_near

GOLDEN = Path(__file__).parents[1] / "golden"
DESCRIPTION = json.loads((GOLDEN / "odvae_small.json").read_text())
TINY = ODVAE_SPECS["od-vae-tiny"]
UNTILED = replace(TINY, tile_frames=None, decode_tile_frames=None, tile_size=None)


def spec_of_case(case: str) -> ODVAESpec:
    """The authors' tile attributes as our fields; they tile on request only."""
    overrides = DESCRIPTION["cases"][case]["overrides"]
    spec = TINY if overrides.get("use_tiling") else UNTILED
    if "tile_sample_min_size" in overrides:
        spec = replace(
            spec, tile_size=overrides["tile_sample_min_size"], tile_overlap=overrides["tile_overlap_factor"]
        )
    if "tile_sample_min_size_t" in overrides:
        frames, latents = overrides["tile_sample_min_size_t"], overrides["tile_latent_min_size_t"]
        spec = replace(spec, tile_frames=frames - 1, decode_tile_frames=latents - 1)
    return spec


@pytest.fixture(scope="module")
def arrays():
    with np.load(GOLDEN / "odvae_small.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file}


@pytest.fixture(scope="module")
def vae():
    return seeded_vae(TINY, seed=DESCRIPTION["weights_seed"])


@pytest.mark.parametrize("case", DESCRIPTION["cases"])
def test_moments_and_pixels_are_the_authors(case, arrays, vae):
    video, moments, decoded = (arrays[f"{case}/{name}"] for name in ("video", "moments", "decoded"))
    vae.spec = spec_of_case(case)
    with torch.inference_mode():
        if vae.spec.is_valid_num_frames(video.shape[2]):
            posterior = vae.encode(video)
            got = torch.cat([posterior.mean, posterior.logvar], 1)
        else:  # the authors' network drops the last frames; ours refuses such lengths before it gets there
            with pytest.raises(ValueError, match=r"expected 1 \+ 4\*k"):
                vae.encode(video)
            got = vae._encode_moments(video)
        assert_near(got, moments, max_abs=2e-4, rel_rms=1e-5)
        assert_near(vae.decode(moments.chunk(2, 1)[0]), decoded, max_abs=1e-3, rel_rms=5e-5)


def test_keys_shapes_and_parameter_counts_are_the_checkpoints():
    table = json.loads((GOLDEN / "odvae_state_dict_keys.json").read_text())
    spec = ODVAE_SPECS["od-vae"]
    with torch.device("meta"):
        vae = ODVAE(spec)
    assert {key: list(value.shape) for key, value in vae.state_dict().items()} == table
    counts = [sum(p.numel() for p in part.parameters()) for part in (vae, vae.encoder, vae.decoder)]
    assert counts == [239_189_991, 94_399_368, 144_790_531]


@pytest.mark.parametrize("num_frames", [33, 37, 65, 93])
def test_temporal_tiles_are_the_authors(num_frames):
    starts = list(range(0, num_frames, 32))
    spans = [(start, start + 33) for start in starts[:-1]]
    if not spans or spans[-1][1] < num_frames:
        spans.append((starts[-1], num_frames))
    assert [(tile.start, tile.stop) for tile in TINY.encode_tiles(num_frames)] == spans
    assert [tile.drop for tile in TINY.encode_tiles(num_frames)] == [0] + [1] * (len(spans) - 1)


def test_decode_tiles_have_16_latents_not_9():
    assert [(tile.start, tile.stop, tile.drop) for tile in TINY.decode_tiles(17)] == [(0, 16, 0), (15, 17, 1)]
    assert len(TINY.decode_tiles(16)) == 1


def authors_spatial_tiles(function, x, *, tile, step, blend, keep):
    """Section by section as the authors' release does it, in place: rows first, columns inside."""
    rows = [
        [function(x[..., top : top + tile, left : left + tile]).clone() for left in range(0, x.shape[-1], step)]
        for top in range(0, x.shape[-2], step)
    ]
    result = []
    for i, row in enumerate(rows):
        for j, piece in enumerate(row):
            if i:
                above, extent = rows[i - 1][j], min(blend, rows[i - 1][j].shape[-2], piece.shape[-2])
                for y in range(extent):
                    piece[..., y, :] = above[..., y - extent, :] * (1 - y / extent) + piece[..., y, :] * (y / extent)
            if j:
                left, extent = row[j - 1], min(blend, row[j - 1].shape[-1], piece.shape[-1])
                for k in range(extent):
                    piece[..., k] = left[..., k - extent] * (1 - k / extent) + piece[..., k] * (k / extent)
        result.append(torch.cat([piece[..., :keep, :keep] for piece in row], dim=-1))
    return torch.cat(result, dim=-2)


def test_a_video_that_is_cut_in_time_is_cut_in_space_too(vae, video):
    """64 pixels fit one spatial tile, but tiles start every 48: a strip of 16 at the edge, blended in."""
    vae.spec = replace(TINY, tile_size=64, tile_overlap=0.25, tile_frames=8, decode_tile_frames=2)
    clip = video(1, 13, 16, 64)
    with torch.inference_mode():
        expected = [
            authors_spatial_tiles(vae._encode_moments, clip[:, :, start:stop], tile=64, step=48, blend=2, keep=6)
            for start, stop in ((0, 9), (8, 13))
        ]
        moments = torch.cat([expected[0], expected[1][:, :, 1:]], dim=2)
        got = vae.encode(clip)
        alone = vae.encode_tile(clip[:, :, :9])
        as_part = vae.encode_tile(clip[:, :, :9], num_frames=13)
        pixels = torch.cat(
            [
                authors_spatial_tiles(
                    vae._decode_pixels, got.mean[:, :, start:stop], tile=8, step=6, blend=16, keep=48
                )[:, :, drop:]
                for start, stop, drop in ((0, 3, 0), (2, 4, 1))
            ],
            dim=2,
        )
        decoded = vae.decode(got.mean)
    torch.testing.assert_close(got.mean, moments.chunk(2, 1)[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(as_part, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, pixels, atol=1e-5, rtol=1e-5)
    assert (alone - as_part).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["od-vae", "od-vae-tiny"])
def test_default_spatial_tiles_are_the_authors(name):
    spec = ODVAE_SPECS[name]
    for tiling, numbers in ((spec.encode_tiling, (256, 224, 4, 28)), (spec.decode_tiling, (32, 28, 32, 224))):
        assert tiling is not None
        assert (tiling.tile, tiling.stride, tiling.out_overlap, tiling.out_stride) == numbers
        assert tiling.past_edge
    assert spec.encode_tiling_of(33, 256, 256) is None
    assert spec.encode_tiling_of(37, 256, 256) == spec.encode_tiling
    assert spec.encode_tiling_of(1, 256, 264) == spec.encode_tiling
    assert spec.decode_tiling_of(16, 32, 32) is None
    assert spec.decode_tiling_of(17, 32, 32) == spec.decode_tiling


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_overlap": 0.2}, "would not line up; 64, 256 and 512 do"),
        ({"tile_size": 100}, "would not line up"),
        ({"tile_frames": 30}, "tile_frames: expected a positive multiple of time_stride=4"),
        ({"tile_frames": None}, "decode_tile_frames: expected None with tile_frames=None and only then"),
        ({"decode_tile_frames": 0}, "decode_tile_frames: expected >= 1"),
        ({"widths": (32, 64, 128)}, "widths: expected 4 positive multiples of 32"),
        ({"time_stride": 2}, "time_stride, space_stride: expected 4, 8, got 2, 8"),
    ],
)
def test_specs_that_no_network_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **change)
