"""What every family behind the seam promises, on every tiny spec: a SPECS entry named "...-tiny" is all it takes.

What not all families promise (exact prefixes, streams) is tested where they claim it, `VideoVAE.prefix_exact` and
`VideoVAE.streams`; what a latent stands for is claimed by `VAESpec.frame_span`.
"""

import copy
import importlib.util
import json
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from cvvae import SPECS, DiagonalGaussian, VAESpec, VideoVAE, load_vae, save_vae, seeded_vae, spec_from_dict
from cvvae import weights_sha256 as sha256_of
from cvvae.diffusers_vae import DiffusersSpec
from cvvae.families import FAMILIES
from cvvae.posterior import LOGVAR_RANGE

TINY = sorted(name for name in SPECS if name.endswith("-tiny"))
ROUNDING = 1e-5
"""Largest difference between sums in another order, relative to the largest value."""


@cache
def made(name: str) -> VideoVAE:
    """A family of diffusers is skipped where that is not installed; one that is there and does not import fails."""
    spec = SPECS[name]
    if isinstance(spec, DiffusersSpec) and importlib.util.find_spec("diffusers") is None:
        pytest.skip("no diffusers here (extra `peers`)")
    return seeded_vae(spec, seed=17)


@pytest.fixture(params=TINY)
def vae(request) -> VideoVAE:
    return made(request.param)


def valid_lengths(spec: VAESpec, below: int = 80) -> list[int]:
    return [number for number in range(1, below) if spec.is_valid_num_frames(number)]


def short_length(spec: VAESpec) -> int:
    """Of more than one frame, in one temporal tile."""
    return next(number for number in valid_lengths(spec) if number > 1)


def long_length(spec: VAESpec) -> int:
    """Of more than one temporal tile, the last one not only a frame; of a few latents where there are no tiles."""
    above = 2 * short_length(spec) if spec.longest_tile is None else spec.longest_tile + spec.frame_unit
    return next(number for number in valid_lengths(spec, above + 80) if number >= above)


def noise(spec: VAESpec, num_frames: int, *, batch: int = 1, seed: int = 0) -> Tensor:
    """video_BCTHW in the spec's pixel range, a few latents large."""
    low, high = spec.pixel_range
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, spec.in_channels, num_frames, 2 * spec.space_stride, 3 * spec.space_stride)
    return low + (high - low) * torch.rand(shape, generator=generator)


def encoded(vae: VideoVAE, video_BCTHW: Tensor) -> DiagonalGaussian:
    with torch.inference_mode():
        return vae.encode(video_BCTHW)


def assert_equal_to_rounding(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= ROUNDING * expected.abs().max()


def test_shapes_follow_from_the_spec_and_all_is_finite(vae):
    spec = vae.spec
    for num_frames in (valid_lengths(spec)[0], short_length(spec), long_length(spec)):
        video = noise(spec, num_frames)
        posterior = encoded(vae, video)
        assert posterior.mean.shape == posterior.logvar.shape == (1, *spec.latent_shape(*video.shape[2:]))
        assert posterior.mean.isfinite().all()
        assert LOGVAR_RANGE[0] <= posterior.logvar.min() <= posterior.logvar.max() <= LOGVAR_RANGE[1]
        with torch.inference_mode():
            decoded = vae.decode(posterior.mean)
        assert decoded.shape == video.shape
        assert decoded.isfinite().all()


def test_what_does_not_fit_is_refused(vae):
    spec = vae.spec
    video = noise(spec, short_length(spec))
    refused: dict[str, Tensor] = {
        "width: expected a positive multiple": video[..., :-1],
        "height: expected a positive multiple": video[..., 1:, :],
        "video_BCTHW: expected 5 dimensions": video[0],
        "C=": video[:, :1],
        "none empty": video[:, :, :0],
        "expected the model's dtype": video.to(torch.float64),
    }
    invalid = [number for number in range(1, 80) if not spec.is_valid_num_frames(number)]
    if invalid:
        refused["video frames T: expected .* got"] = noise(spec, invalid[0])
    for message, wrong in refused.items():
        with pytest.raises(ValueError, match=message):
            encoded(vae, wrong)
    with pytest.raises(ValueError, match="latent_BCTHW: expected"):
        vae.decode(torch.zeros(1, spec.latent_channels + 1, 1, 2, 3))


@pytest.mark.parametrize("name", [name for name in TINY if SPECS[name].longest_tile is not None])
def test_a_tile_longer_than_the_plan_is_refused(name):
    vae, spec = made(name), SPECS[name]
    with pytest.raises(ValueError, match=f"expected at most {spec.longest_tile} frames"):
        vae.encode_tile(noise(spec, long_length(spec)))


def test_the_memory_format_is_used_and_changes_no_number(vae):
    contiguous = seeded_vae(vae.spec, seed=17).use_memory_format(torch.contiguous_format)
    layouts = {parameter.is_contiguous() for parameter in contiguous.parameters()}
    assert layouts == {True}
    video = noise(vae.spec, short_length(vae.spec))
    expected, got = encoded(vae, video), encoded(contiguous, video)
    assert_equal_to_rounding(got.mean, expected.mean)
    with torch.inference_mode():
        assert_equal_to_rounding(contiguous.decode(expected.mean), vae.decode(expected.mean))


def test_twice_is_bitwise_equal(vae):
    video = noise(vae.spec, long_length(vae.spec))
    first, again = encoded(vae, video), encoded(vae, video.clone())
    assert torch.equal(first.mean, again.mean)
    assert torch.equal(first.logvar, again.logvar)
    with torch.inference_mode():
        assert torch.equal(vae.decode(first.mean), vae.decode(again.mean))


def test_a_batch_is_its_clips(vae):
    videos = noise(vae.spec, short_length(vae.spec), batch=3)
    together = encoded(vae, videos)
    alone = [encoded(vae, video[None]) for video in videos]
    assert_equal_to_rounding(together.mean, torch.cat([posterior.mean for posterior in alone]))
    assert_equal_to_rounding(together.logvar, torch.cat([posterior.logvar for posterior in alone]))
    with torch.inference_mode():
        decoded = vae.decode(together.mean)
        assert_equal_to_rounding(decoded, torch.cat([vae.decode(mean[None]) for mean in together.mean]))


def test_encode_is_its_tiles_joined(vae):
    """What a pipeline does that batches tiles of many windows."""
    num_frames = long_length(vae.spec)
    video = noise(vae.spec, num_frames)
    with torch.inference_mode():
        moments = [
            vae.encode_tile(video[:, :, tile.start : tile.stop], num_frames=num_frames)[:, :, tile.drop :]
            for tile in vae.time_tiles(num_frames)
        ]
    joined = DiagonalGaussian.from_moments(torch.cat(moments, dim=2))
    whole = encoded(vae, video)
    assert torch.equal(whole.mean, joined.mean)
    assert torch.equal(whole.logvar, joined.logvar)


def test_every_frame_has_one_latent_that_stands_for_it(vae):
    spec = vae.spec
    for num_frames in valid_lengths(spec):
        spans = [spec.frame_span(latent) for latent in range(spec.num_latent_frames(num_frames))]
        assert spans[0][0] == 0
        assert spans[-1][1] == num_frames
        assert all(before[1] == after[0] < after[1] for before, after in pairwise(spans))
        assert spec.num_video_frames(len(spans)) == num_frames


def tiles_of_latents(vae: VideoVAE, num_frames: int) -> list[tuple[int, int]]:
    """For each latent the video frames [start, stop) of the tile that it was computed in."""
    return [
        (tile.start, tile.stop)
        for tile in vae.time_tiles(num_frames)
        for _ in range(vae.spec.num_latent_frames(tile.num_frames) - tile.drop)
    ]


@pytest.mark.parametrize("which", ["first", "middle", "last"])
def test_a_changed_frame_changes_its_latent_and_none_that_may_not_see_it(which, vae):
    spec = vae.spec
    num_frames = long_length(spec)
    frame = {"first": 0, "middle": num_frames // 2, "last": num_frames - 1}[which]
    video = noise(spec, num_frames)
    changed = video.clone()
    changed[:, :, frame] = noise(spec, num_frames, seed=1)[:, :, frame]
    before, after = encoded(vae, video).mean, encoded(vae, changed).mean
    scale = before.abs().max()
    tiles = tiles_of_latents(vae, num_frames)
    assert len(tiles) == before.shape[2]
    for latent, (start, stop) in enumerate(tiles):
        difference = (after[:, :, latent] - before[:, :, latent]).abs().max()
        first, end = spec.frame_span(latent)
        if first <= frame < end:
            assert difference > 1e-3 * scale, f"latent {latent} stands for frame {frame}"
        if not start <= frame < stop:
            assert difference == 0, f"latent {latent} is of frames {start} to {stop}"
        elif vae.prefix_exact and end <= frame:
            assert difference <= ROUNDING * scale, f"latent {latent} ends before frame {frame}"


def test_first_frames_give_the_first_latents_where_claimed(vae):
    """At every valid length if `prefix_exact`, else where the first temporal tile ends."""
    spec = vae.spec
    num_frames = long_length(spec)
    video = noise(spec, num_frames)
    whole = encoded(vae, video).mean
    lengths = [vae.time_tiles(num_frames)[0].stop]
    if vae.prefix_exact:
        lengths = [number for number in valid_lengths(spec) if number < num_frames]
    for length in lengths:
        part = encoded(vae, video[:, :, :length]).mean
        assert_equal_to_rounding(part, whole[:, :, : part.shape[2]])


@pytest.mark.parametrize("units", [1, 2])
def test_a_stream_is_one_shot_where_claimed(units, vae):
    spec = vae.spec
    if not vae.streams:
        with pytest.raises(ValueError, match="does not stream"):
            vae.encode_chunk(noise(spec, short_length(spec)), None)
        with pytest.raises(ValueError, match="does not stream"):
            vae.decode_chunk(torch.zeros(1, spec.latent_channels, 1, 2, 3), None)
        return
    assert vae.prefix_exact
    step = units * spec.frame_unit
    video = noise(spec, 1 + 2 * step)
    with torch.inference_mode():
        state: Any = None
        parts = []
        for start, stop in ((0, 1), (1, 1 + step), (1 + step, 1 + 2 * step)):
            moments, state = vae.encode_chunk(video[:, :, start:stop], state)
            parts.append(moments)
        posterior = vae.encode(video)
        streamed = DiagonalGaussian.from_moments(torch.cat(parts, dim=2))
        assert_equal_to_rounding(streamed.mean, posterior.mean)
        assert_equal_to_rounding(streamed.logvar, posterior.logvar)
        state, parts = None, []
        for latents in posterior.mean.split([1, *[step // spec.time_stride] * 2], dim=2):
            pixels, state = vae.decode_chunk(latents, state)
            parts.append(pixels)
        assert_equal_to_rounding(torch.cat(parts, dim=2), vae.decode(posterior.mean))


def test_gradients_reach_every_frame(vae):
    video = noise(vae.spec, short_length(vae.spec)).requires_grad_()
    with torch.no_grad():
        without = vae.encode(video).mean
    mean = vae.encode(video).mean
    torch.testing.assert_close(mean, without, rtol=1e-4, atol=1e-4)
    vae.decode(mean).square().mean().backward()
    assert video.grad is not None
    assert (video.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all()
    vae.zero_grad()


@pytest.mark.parametrize("name", TINY)
def test_the_identity_has_every_field_of_the_spec(name):
    spec = SPECS[name]
    text = json.dumps(spec.to_dict())
    assert spec_from_dict(json.loads(text)) == spec
    for field in fields(spec):
        other = copy.copy(spec)
        object.__setattr__(other, field.name, "another")  # past the checks: only what is written counts here
        assert json.dumps(other.to_dict()) != text, f"{field.name} is not part of the identity"


def test_a_saved_model_comes_back_the_same(vae, tmp_path):
    assert vae.weights_sha256 == sha256_of(vae)
    loaded = load_vae(save_vae(vae, tmp_path))
    assert loaded.spec == vae.spec
    assert sha256_of(loaded) == sha256_of(vae)
    video = noise(vae.spec, short_length(vae.spec))
    assert torch.equal(encoded(loaded, video).mean, encoded(vae, video).mean)


def test_no_other_family_takes_its_keys_for_its_own(vae):
    tensors = vae.state_dict()
    others = [family for family in FAMILIES.values() if family is not FAMILIES[vae.spec.family]]
    assert not any(family.recognises(tensors) for family in others)


def test_normalized_latents_are_the_specs_and_come_back(vae):
    spec = vae.spec
    latent = torch.randn(2, spec.latent_channels, 2, 3, 2, generator=torch.Generator().manual_seed(0))
    normalized = vae.normalize(latent)
    torch.testing.assert_close(vae.denormalize(normalized), latent)
    for channel in range(spec.latent_channels):
        shift, scale = (
            value[channel] if isinstance(value, tuple) else value
            for value in (spec.shift_factor, spec.scaling_factor)
        )
        torch.testing.assert_close(normalized[:, channel], (latent[:, channel] - shift) * scale)
