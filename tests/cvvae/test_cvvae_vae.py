"""The seam: tiles are what encode does, batches are what single clips give, errors say expected and got."""

import subprocess
import sys

import pytest
import torch

from cvvae import SPECS, DiagonalGaussian, seeded_vae


@pytest.fixture(params=["sd21", "sd3"])
def vae(request):
    return request.getfixturevalue(request.param)


def test_encode_is_its_tiles_joined(vae, video):
    clip = video(1, 37, 16, 24)
    with torch.inference_mode():
        whole = vae.encode(clip)
        moments = [
            vae.encode_tile(clip[:, :, tile.start : tile.stop])[:, :, tile.drop :] for tile in vae.time_tiles(37)
        ]
    joined = DiagonalGaussian.from_moments(torch.cat(moments, dim=2))
    assert torch.equal(whole.mean, joined.mean)
    assert torch.equal(whole.logvar, joined.logvar)


def test_decode_is_its_tiles_joined(vae):
    latent = torch.randn(1, vae.spec.latent_channels, 7, 2, 3)
    with torch.inference_mode():
        whole = vae.decode(latent)
        parts = [vae.decode(latent[:, :, :5]), vae.decode(latent[:, :, 4:])[:, :, 1:]]
    assert whole.shape == (1, 3, 25, 16, 24)
    assert torch.equal(whole, torch.cat(parts, dim=2))


def test_a_batch_is_its_clips(vae, video):
    clips = torch.cat([video(1, 9, 24, 16, seed=seed) for seed in range(3)])
    with torch.inference_mode():
        together = vae.encode_tile(clips)
        alone = torch.cat([vae.encode_tile(clip[None]) for clip in clips])
        decoded = vae.decode(together.chunk(2, 1)[0])
        decoded_alone = torch.cat([vae.decode(z[None]) for z in together.chunk(2, 1)[0]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, decoded_alone, atol=5e-5, rtol=1e-5)


def test_twice_is_bitwise_equal_and_memory_layout_does_not_matter(vae, video):
    clip = video(2, 17, 16, 16)
    with torch.inference_mode():
        first = vae.encode(clip)
        assert torch.equal(first.mean, vae.encode(clip).mean)
        assert torch.equal(first.mean, vae.encode(clip.contiguous(memory_format=torch.channels_last_3d)).mean)
        assert torch.equal(vae.decode(first.mean), vae.decode(first.mean))


@pytest.mark.parametrize("num_frames", [5, 21])
def test_gradients_reach_the_pixels_through_tiles(num_frames, video):
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=1)
    clip = video(1, num_frames, 16, 16).requires_grad_()
    with torch.no_grad():
        without = vae.encode(clip).mean
    mean = vae.encode(clip).mean
    torch.testing.assert_close(mean, without)
    vae.decode(mean).square().mean().backward()
    assert clip.grad is not None
    assert (clip.grad.abs().amax(dim=(0, 1, 3, 4)) > 0).all(), "a frame without a gradient"
    assert all(parameter.grad is not None for parameter in vae.parameters())


def test_gradients_are_the_slope(video):
    """The in-place activations and residuals must not spoil autograd."""
    vae = seeded_vae(SPECS["cvvae-sd3-tiny"], seed=2).double()
    clip = video(1, 5, 8, 8).double().requires_grad_()
    direction = torch.randn(clip.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    step = 1e-5

    def loss(x):
        return vae.decode(vae.encode(x).mean).square().mean()

    loss(clip).backward()
    with torch.no_grad():
        slope = (loss(clip + step * direction) - loss(clip - step * direction)) / (2 * step)
    assert clip.grad is not None
    torch.testing.assert_close((clip.grad * direction).sum(), slope, rtol=1e-5, atol=1e-9)


def test_normalize_and_denormalize_are_inverse(vae):
    latent = torch.randn(1, vae.spec.latent_channels, 2, 3, 3)
    torch.testing.assert_close(vae.denormalize(vae.normalize(latent)), latent)
    expected = (latent - vae.spec.shift_factor) * vae.spec.scaling_factor
    torch.testing.assert_close(vae.normalize(latent), expected)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=["bf16", "fp16"]
)
def test_half_precision_is_near_fp32(dtype, tolerance, vae, video):
    """Relative RMS measured by jobs/measure_precision.py, with room for other machines; fp16 is slow, hence tiny."""
    clip = video(1, 5, 16, 16)
    half = seeded_vae(vae.spec, seed=13).to(dtype)
    with torch.inference_mode():
        exact = seeded_vae(vae.spec, seed=13).encode_tile(clip)
        moments = half.encode_tile(clip.to(dtype))
        decoded = half.decode(moments.chunk(2, 1)[0])
    assert moments.dtype == decoded.dtype == dtype
    assert decoded.isfinite().all()
    error = (moments.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < tolerance


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        ((3, 5, 16, 16), torch.float32, r"video_BCTHW: expected 5 dimensions .* got shape \(3, 5, 16, 16\)"),
        ((1, 4, 5, 16, 16), torch.float32, r"C=3"),
        ((0, 3, 5, 16, 16), torch.float32, "none empty"),
        ((1, 3, 5, 16, 16), torch.uint8, "expected the model's dtype torch.float32, got torch.uint8"),
        ((1, 3, 4, 16, 16), torch.float32, r"expected 1 \+ 4\*k"),
        ((1, 3, 5, 12, 16), torch.float32, "height: expected a positive multiple of 8"),
    ],
)
def test_bad_videos_are_refused(shape, dtype, message, sd21):
    for function in (sd21.encode, sd21.encode_tile):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(shape, dtype=dtype))


def test_a_tile_that_is_too_long_and_a_latent_of_another_model_are_refused(sd21):
    with pytest.raises(ValueError, match=r"expected at most 17 frames .* got 21"):
        sd21.encode_tile(torch.zeros(1, 3, 21, 8, 8))
    with pytest.raises(ValueError, match="C=4"):
        sd21.decode(torch.zeros(1, 16, 1, 2, 2))


PEAK = """
import resource, sys, torch
from cvvae import SPECS, seeded_vae
torch.set_num_threads(1)
vae, T = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=1), int(sys.argv[1])
video = torch.zeros(1, 3, T, 64, 64)
with torch.inference_mode():
    vae.decode(vae.encode(video).mean)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in other units elsewhere")
def test_memory_does_not_grow_with_the_length_of_the_video():
    def peak_mib(num_frames: int) -> int:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(num_frames)], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    # in and out of 64 more frames are 6 MiB; untiled, their activations would be several hundred
    assert peak_mib(81) - peak_mib(17) < 60
