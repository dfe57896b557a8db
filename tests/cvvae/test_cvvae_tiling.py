"""Tile plans cover everything once; tiled functions give what the plan says; gradients flow through."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from hypothesis import given
from hypothesis import strategies as st

from cvvae import Tile
from cvvae.tiling import SpatialTiling, apply_spatial_tiles, apply_time_tiles, blend, plan_time_tiles


@given(steps=st.integers(0, 300), time_stride=st.sampled_from([1, 2, 4, 8]), latents=st.integers(1, 6))
def test_time_tiles_cover_share_one_frame_and_add_up(steps, time_stride, latents):
    num_frames, stride = 1 + time_stride * steps, time_stride * latents
    tiles = plan_time_tiles(num_frames, stride=stride)
    assert tiles[0].start == 0
    assert tiles[-1].stop == num_frames
    assert all(after.start == before.stop - 1 for before, after in pairwise(tiles))
    assert all(tile.num_frames == stride + 1 for tile in tiles[:-1])
    assert 1 <= tiles[-1].num_frames <= stride + 1
    assert [tile.drop for tile in tiles] == [0] + [1] * (len(tiles) - 1)
    kept = [1 + (tile.num_frames - 1) // time_stride - tile.drop for tile in tiles]
    assert sum(kept) == 1 + steps
    assert all(count > 0 for count in kept)
    # the latent-side plan for decoding is the same plan in latent frames
    decode = plan_time_tiles(1 + steps, stride=latents)
    assert [(t.start * time_stride, (t.stop - 1) * time_stride + 1) for t in decode] == [
        (t.start, t.stop) for t in tiles
    ]


def test_the_authors_plan_for_33_frames():
    assert plan_time_tiles(33, stride=16) == (Tile(0, 17, 0), Tile(16, 33, 1))
    assert plan_time_tiles(21, stride=16) == (Tile(0, 17, 0), Tile(16, 21, 1))
    assert plan_time_tiles(1, stride=16) == (Tile(0, 1, 0),)
    assert plan_time_tiles(99, stride=None) == (Tile(0, 99, 0),)


@pytest.mark.parametrize(("num_frames", "stride"), [(0, 16), (5, 0)])
def test_impossible_plans_are_refused(num_frames, stride):
    with pytest.raises(ValueError, match=r"expected .* >= 1, got 0"):
        plan_time_tiles(num_frames, stride=stride)


def test_time_tiles_join_in_place_and_with_gradients_alike():
    x = torch.randn(2, 3, 33, 4, 4)
    tiles = plan_time_tiles(33, stride=16)
    with_gradients = apply_time_tiles(lambda t: t[:, :, ::4], x.clone().requires_grad_(), tiles, num_frames_out=9)
    assert torch.equal(apply_time_tiles(lambda t: t[:, :, ::4], x, tiles, num_frames_out=9), x[:, :, ::4])
    assert torch.equal(with_gradients, x[:, :, ::4])
    assert with_gradients.requires_grad


@given(size=st.integers(1, 3000).map(lambda n: n * 8), tile_size=st.sampled_from([72, 144, 576]))
def test_spatial_tiles_reach_the_edge_and_overlap_enough(size, tile_size):
    for tiling, extent in (
        (SpatialTiling.for_encoding(tile_size, overlap=0.2222, space_stride=8), size),
        (SpatialTiling.for_decoding(tile_size, overlap=0.2222, space_stride=8), size // 8),
    ):
        starts = tiling.starts(extent)
        assert starts == tuple(range(0, len(starts) * tiling.stride, tiling.stride))
        assert starts[-1] + tiling.tile >= extent
        assert all(start + tiling.tile < extent for start in starts[:-1])
        if len(starts) > 1:  # the last tile is longer than what is blended away
            assert extent - starts[-1] > tiling.tile - tiling.stride


def test_the_authors_tile_of_576():
    assert SpatialTiling.for_encoding(576, overlap=0.2222, space_stride=8) == SpatialTiling(576, 448, 16, 56)
    assert SpatialTiling.for_decoding(576, overlap=0.2222, space_stride=8) == SpatialTiling(72, 56, 128, 448)


@pytest.mark.parametrize("size", [(72, 72), (80, 72), (104, 136), (200, 72), (72, 312)])
def test_a_function_that_needs_no_context_is_tiled_without_a_trace(size):
    x = torch.randn(1, 2, 1, *size)
    tiling = SpatialTiling.for_encoding(72, overlap=0.2222, space_stride=8)

    def pool(tile):
        return F.avg_pool3d(tile, (1, 8, 8))

    def grow(tile):
        return F.interpolate(tile, scale_factor=(1.0, 8.0, 8.0))

    encoded = apply_spatial_tiles(pool, x, tiling)
    decoded = apply_spatial_tiles(grow, encoded, SpatialTiling.for_decoding(72, overlap=0.2222, space_stride=8))
    torch.testing.assert_close(encoded, pool(x))
    torch.testing.assert_close(decoded, grow(pool(x)))


def test_blend_fades_from_the_tile_before():
    blended = blend(torch.zeros(1, 8), torch.ones(1, 6), overlap=4, dim=-1)
    assert blended.tolist() == [[0.0, 0.25, 0.5, 0.75, 1.0, 1.0]]
    assert torch.equal(blend(torch.zeros(1, 8), torch.ones(1, 6), overlap=0, dim=-1), torch.ones(1, 6))


def test_blending_leaves_its_inputs_alone_and_passes_gradients():
    x = torch.randn(1, 1, 1, 104, 136, dtype=torch.float64, requires_grad=True)
    tiling = SpatialTiling.for_encoding(72, overlap=0.2222, space_stride=8)
    apply_spatial_tiles(lambda tile: F.avg_pool3d(tile, (1, 8, 8)), x, tiling).sum().backward()
    # every pixel ends in exactly one latent with weight 1/64, however many tiles saw it
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 64))
