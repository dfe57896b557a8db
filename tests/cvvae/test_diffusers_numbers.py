"""Every adapter gives the numbers of diffusers' own class, called as that class must be: in one pass, not tiled."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from cvvae import SPECS, DiagonalGaussian, VideoVAE, seeded_vae
from cvvae.diffusers_vae import DiffusersSpec
from cvvae.families import family_of
from cvvae.layers import batch_to_frames, frames_to_batch

diffusers = pytest.importorskip("diffusers")

TINY = sorted(name for name, spec in SPECS.items() if isinstance(spec, DiffusersSpec) and name.endswith("-tiny"))
TOLERANCE = 1e-5
"""Of the largest value: sums in another order."""


def original(vae: VideoVAE) -> Any:
    """diffusers' own model with the same weights, under the keys that the checkpoint has."""
    assert isinstance(vae.spec, DiffusersSpec)
    model = getattr(diffusers, vae.spec.peer.name).from_config(family_of(vae.spec).config_from_spec(vae.spec))
    model.load_state_dict({**vae.state_dict(), **family_of(vae.spec).constants(vae.spec)})
    return model.eval()


@dataclass(frozen=True)
class Call:
    """How diffusers' class is called, where plain `encode(video)` and `decode(latent)` would be something else."""

    encode: Callable[[Any, Tensor], Tensor] = lambda model, video: model.encode(video).latent_dist.parameters
    decode: Callable[[Any, Tensor], Tensor] = lambda model, latent: model.decode(latent).sample


def frames_apart(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return batch_to_frames(function(frames_to_batch(x)), num_clips=len(x))


IMAGE = Call(
    lambda model, video: frames_apart(lambda frames: model.encode(frames).latent_dist.parameters, video),
    lambda model, latent: frames_apart(lambda frames: model.decode(frames).sample, latent),
)
SVD = Call(
    IMAGE.encode,
    lambda model, latent: frames_apart(
        lambda frames: model.decode(frames, num_frames=latent.shape[2]).sample, latent
    ),
)


def in_one_pass(model: Any) -> Any:
    model.use_framewise_encoding = model.use_framewise_decoding = False
    return model


HUNYUAN = Call(
    lambda model, video: in_one_pass(model).encode(video).latent_dist.parameters,
    lambda model, latent: in_one_pass(model).decode(latent).sample,
)
CLIPS_APART = Call(
    lambda model, video: torch.cat([model.encode(clip).latent_dist.parameters for clip in video.split(1)]),
    lambda model, latent: torch.cat([model.decode(clip).sample for clip in latent.split(1)]),
)


def told_the_noise(model: Any, latent: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model.decode(latent, torch.full((len(latent),), SPECS["ltx-0.9.1-tiny"].decode_timestep)).sample


def told_no_noise(model: Any, latent: Tensor) -> Tensor:
    return model.decode(latent, torch.zeros(len(latent))).sample


CALLS = {
    "sd-tiny": IMAGE,
    "flux-tiny": IMAGE,
    "svd-tiny": SVD,
    "hunyuan-tiny": HUNYUAN,
    "hunyuan-windows-tiny": Call(decode=HUNYUAN.decode),  # its encode is what plain calls do
    "hunyuan15-tiny": CLIPS_APART,
    "ltx-0.9.1-tiny": Call(decode=told_the_noise),
    "ltx-0.9.5-tiny": Call(decode=told_no_noise),
}


def video_for(vae: VideoVAE, num_frames: int, *, batch: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    sides = (2 * vae.spec.space_stride, 3 * vae.spec.space_stride)
    return torch.rand(batch, 3, num_frames, *sides, generator=generator) * 2 - 1


def assert_close(got: Tensor, expected: Tensor, *, largest: float | None = None) -> None:
    """`largest` is the largest value before a clamp."""
    assert got.shape == expected.shape
    assert (got - expected).abs().max() <= TOLERANCE * (largest or expected.abs().max())


@pytest.mark.parametrize("units", [0, 1, 5])
@pytest.mark.parametrize("name", TINY)
@torch.inference_mode()
def test_numbers_are_those_of_diffusers(name, units):
    vae = seeded_vae(SPECS[name], seed=5)
    model, call = original(vae), CALLS.get(name, Call())
    video = video_for(vae, 1 + units * vae.spec.frame_unit, batch=2)
    expected = DiagonalGaussian.from_moments(call.encode(model, video))
    posterior = vae.encode(video)
    assert_close(posterior.mean, expected.mean)
    assert_close(posterior.logvar, expected.logvar)
    decoded, expected_video = vae.decode(posterior.mean), call.decode(model, posterior.mean)
    largest = float(decoded.abs().max())
    if vae.spec.family == "wan":  # there it is clamped
        assert largest > 1
        decoded = decoded.clamp(-1, 1)
    assert_close(decoded, expected_video, largest=largest)


@torch.inference_mode()
def test_wan_drops_frames_where_this_refuses():
    vae = seeded_vae(SPECS["wan21-tiny"], seed=5)
    video = video_for(vae, 8)
    model = original(vae)
    assert torch.equal(model.encode(video).latent_dist.mean, model.encode(video[:, :, :5]).latent_dist.mean)
    with pytest.raises(ValueError, match=r"expected 1 \+ 4\*k .* got 8; the nearest shorter is 5"):
        vae.encode(video)


@torch.inference_mode()
def test_hunyuan_called_plainly_is_another_codec():
    vae = seeded_vae(SPECS["hunyuan-tiny"], seed=5)
    video = video_for(vae, 21)
    plain = original(vae).encode(video).latent_dist.mean
    assert (vae.encode(video).mean - plain).abs().max() > 0.01 * plain.abs().max()
    windows = SPECS["hunyuan-windows-tiny"]
    for num_frames, tiles in ((17, 1), (21, 2), (29, 2), (33, 3)):
        assert len(windows.encode_tiles(num_frames)) == tiles
        video = video_for(vae, num_frames)
        assert_close(seeded_vae(windows, seed=5).encode(video).mean, original(vae).encode(video).latent_dist.mean)


@torch.inference_mode()
def test_hunyuan15_takes_batches_that_diffusers_fails_on():
    vae = seeded_vae(SPECS["hunyuan15-tiny"], seed=5)
    video = video_for(vae, 5, batch=2)
    together = vae.encode(video).mean
    for clip, mean in zip(video, together, strict=True):
        assert torch.equal(vae.encode(clip[None]).mean[0], mean)


@torch.inference_mode()
def test_cogvideox_decodes_other_lengths_to_frames_that_nobody_encoded():
    vae = seeded_vae(SPECS["cogvideox-tiny"], seed=5)
    model = original(vae)
    latent = model.encode(video_for(vae, 5)).latent_dist.mean
    assert model.decode(latent).sample.shape[2] == 8
    with pytest.raises(ValueError, match=r"expected 1 \+ 8\*k"):
        vae.encode(video_for(vae, 5))
    with pytest.raises(ValueError, match=r"latent frames t: expected 1 \+ 2\*k"):
        vae.decode(latent)


@torch.inference_mode()
def test_ltx_gives_back_another_size_where_this_refuses():
    vae = seeded_vae(SPECS["ltx-0.9.0-tiny"], seed=5)
    video = torch.zeros(1, 3, 1, 80, 64)
    model = original(vae)
    assert model.decode(model.encode(video).latent_dist.mean).sample.shape[-2:] == (96, 64)
    with pytest.raises(ValueError, match="height: expected a positive multiple of 32"):
        vae.encode(video)


@torch.inference_mode()
def test_no_call_leaves_anything_behind():
    """A failed call, then two streams at once: neither disturbs the other, as caches on the model would."""
    vae = seeded_vae(SPECS["wan22-tiny"], seed=5)
    first, second = video_for(vae, 9), video_for(vae, 9).flip(2)
    alone = [vae.encode(video).mean for video in (first, second)]
    with pytest.raises(ValueError, match="expected"):
        vae.encode_chunk(first[:, :, :2], None)
    states: list[Any] = [None, None]
    parts: list[list[Tensor]] = [[], []]
    for frames in (slice(0, 5), slice(5, 9)):
        for stream, video in enumerate((first, second)):
            moments, states[stream] = vae.encode_chunk(video[:, :, frames], states[stream])
            parts[stream].append(moments)
    for moments, expected in zip(parts, alone, strict=True):
        assert_close(torch.cat(moments, dim=2).chunk(2, dim=1)[0], expected)
    with pytest.raises(ValueError, match=r"state: expected \d+ tensors"):
        vae.encode_chunk(first[:, :, 1:5], states[0][:-1])


@torch.inference_mode()
def test_the_chunk_of_wan_is_free_and_that_of_cogvideox_is_not():
    from dataclasses import replace

    for name, is_free in (("wan21-tiny", True), ("wan22-tiny", True), ("cogvideox-tiny", False)):
        spec = SPECS[name]
        assert isinstance(spec, DiffusersSpec)
        longer = replace(spec, chunk_frames=16)
        assert longer.to_dict() != spec.to_dict()
        vae, other = seeded_vae(spec, seed=5), seeded_vae(longer, seed=5)
        video = video_for(vae, 33)
        mean = vae.encode(video).mean
        difference = (other.encode(video).mean - mean).abs().max() / mean.abs().max()
        assert difference < 1e-5 if is_free else difference > 1e-2
        if is_free:
            assert_close(other.decode(mean), vae.decode(mean))


@torch.inference_mode()
def test_the_noise_of_ltx_091_is_the_same_each_time_and_takes_none_from_others():
    vae = seeded_vae(SPECS["ltx-0.9.1-tiny"], seed=5)
    latent = vae.encode(video_for(vae, 9)).mean
    torch.manual_seed(7)
    expected = torch.rand(4)
    torch.manual_seed(7)
    first = vae.decode(latent)
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(vae.decode(latent), first)


def test_ltx2_needs_more_than_one_latent_to_reflect_at():
    vae = seeded_vae(SPECS["ltx2-tiny"], seed=5)
    with pytest.raises(ValueError, match="expected sides of at least 2"):
        vae.decode(torch.zeros(1, 8, 1, 1, 3))


@torch.inference_mode()
def test_mochi_in_half_precision_would_encode_noise():
    """What diffusers does with a model in bfloat16 is far from rounding, so it is refused."""
    vae = seeded_vae(SPECS["mochi-tiny"], seed=5)
    video = video_for(vae, 7)
    exact = vae.encode(video).mean
    rounded = original(vae).encode(video.bfloat16().float()).latent_dist.mean  # the pixels alone
    assert (rounded - exact).abs().mean() > 0.1 * exact.abs().mean()
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(ValueError, match="expected float32 to encode"):
            vae.to(dtype).encode(video.to(dtype))
