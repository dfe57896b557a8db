"""IV-VAE inflated from an image VAE of its own layers: key frames are coded as images, exactly."""

from dataclasses import replace

import pytest
import torch

from cvvae import SPECS, load_vae, save_vae, seeded_vae
from cvvae.iv_vae import IVVAE_SPECS
from cvvae.keyframe_inflation import image_spec_for, inflate_keyframes

NAMES = [
    "ivvae-z4-tiny",
    "ivvae-z16-tiny",
    "ivvae-baseline-ktc-tiny",
    "ivvae-baseline-ktc-3d-tiny",
    "ivvae-baseline-ktc-group-causal-tiny",
    "ivvae-baseline-ktc-pac-attention-tiny",
]
ROUNDING = 2e-5
KEY_FRAMES = [0, 1, 5]
"""Of the latents of 9 frames: the first frame of each group."""


@pytest.fixture(params=NAMES)
def models(request):
    """The image VAE, with weights as if trained, and the video VAE that starts from it."""
    spec = IVVAE_SPECS[request.param]
    image_vae = seeded_vae(image_spec_for(spec), seed=9)
    return image_vae, inflate_keyframes(image_vae, spec)


def assert_near(got, expected):
    assert got.shape == expected.shape
    assert (got - expected).square().mean().sqrt() <= ROUNDING * expected.square().mean().sqrt()


def frames_alone(function, x_BCTHW):
    """A function of videos on every frame by itself."""
    return [function(frame) for frame in x_BCTHW.split(1, dim=2)]


def test_key_frames_are_encoded_and_decoded_as_images(models, video):
    image_vae, vae = models
    clip = video(2, 9, 16, 24)
    half = vae.spec.latent_channels // 2
    with torch.inference_mode():
        posterior = vae.encode(clip)
        images = frames_alone(image_vae.encode, clip[:, :, KEY_FRAMES])
        assert_near(posterior.mean[:, :half], torch.cat([image.mean for image in images], dim=2))
        assert_near(posterior.logvar[:, :half], torch.cat([image.logvar for image in images], dim=2))
        latent = torch.randn_like(posterior.mean)
        pictures = frames_alone(image_vae.decode, latent[:, :half])
        assert_near(vae.decode(latent)[:, :, KEY_FRAMES], torch.cat(pictures, dim=2))


def test_where_nothing_moves_every_frame_is_the_images_reconstruction(models, video):
    image_vae, vae = models
    picture = video(1, 1, 16, 24)
    with torch.inference_mode():
        image_latent = image_vae.encode(picture).mean
        latent = vae.encode(picture.expand(-1, -1, 9, -1, -1)).mean
        assert_near(latent, torch.cat([image_latent, image_latent], dim=1).expand(-1, -1, 3, -1, -1))
        assert_near(vae.decode(latent), image_vae.decode(image_latent).expand(-1, -1, 9, -1, -1))


def test_motion_reaches_the_motion_half_alone(models, video):
    _, vae = models
    clip = video(1, 5, 16, 16)
    other = clip.clone()
    other[:, :, 3] = -clip[:, :, 3]
    half = vae.spec.latent_channels // 2
    with torch.inference_mode():
        before, after = vae.encode(clip).mean, vae.encode(other).mean
    assert torch.equal(before[:, :half], after[:, :half])
    assert not torch.equal(before[:, half:], after[:, half:])


def test_every_weight_is_written(models):
    """Two inflations are equal whatever the global generator gave the fresh modules."""
    image_vae, vae = models
    torch.manual_seed(123)
    again = inflate_keyframes(image_vae, vae.spec)
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


def test_the_image_vae_is_trained_and_saved_by_the_same_code(tmp_path, video):
    spec = image_spec_for(IVVAE_SPECS["ivvae-z4-dim64"])
    assert (spec.latent_channels, spec.widths) == (2, (64, 128, 256, 256))
    image_vae = seeded_vae(image_spec_for(IVVAE_SPECS["ivvae-z4-tiny"]), seed=1)
    image_vae.train().encode(video(1, 1, 16, 16)).kl().sum().backward()
    loaded = load_vae(save_vae(image_vae, tmp_path))
    assert inflate_keyframes(loaded, IVVAE_SPECS["ivvae-z4-tiny"]).spec == IVVAE_SPECS["ivvae-z4-tiny"]


def test_image_vaes_that_do_not_fit_are_refused():
    tiny = IVVAE_SPECS["ivvae-z4-tiny"]
    image_vae = seeded_vae(replace(image_spec_for(tiny), latent_channels=4, attention="middle"), seed=1)
    with pytest.raises(
        ValueError, match="'ivvae-z4-tiny-keyframes': latent_channels: expected 2, got 4; attention: expected 'deep'"
    ):
        inflate_keyframes(image_vae, tiny)
    with pytest.raises(ValueError, match="family: expected 'ivvae-baseline', got 'ivvae'"):
        inflate_keyframes(seeded_vae(tiny, seed=1), tiny)
    with pytest.raises(ValueError, match=r"expected two branches and an even width .* got branches='one'"):
        image_spec_for(IVVAE_SPECS["ivvae-baseline-tiny"])
    assert "ivvae-z4-tiny-keyframes" not in SPECS
