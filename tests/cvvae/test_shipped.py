"""The checkpoints that come with the package: whole, small, and good enough to look at."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from cvvae import load_vae
from cvvae.image_vae_checkpoint import load_image_vae
from cvvae.shipped import SHIPPED, shipped_checkpoint

MAX_BYTES = 12 * 1000**2


def test_they_are_small_together() -> None:
    files = [path for name in SHIPPED for path in shipped_checkpoint(name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


@pytest.mark.parametrize("name", SHIPPED)
def test_the_card_names_the_weights(name: str) -> None:
    folder = shipped_checkpoint(name)
    (weights,) = folder.glob("*.safetensors")
    assert hashlib.sha256(weights.read_bytes()).hexdigest() in (folder / "README.md").read_text()


def test_both_speak_one_latent_space() -> None:
    image, video = load_image_vae(shipped_checkpoint("tiny-image-vae")), load_vae(shipped_checkpoint("tiny-cvvae"))
    assert (image.scaling_factor, image.vae.latent_channels) == (
        video.spec.scaling_factor,
        video.spec.latent_channels,
    )


def psnr(decoded: torch.Tensor, source: torch.Tensor) -> float:
    return float(-10 * ((decoded.clamp(-1, 1) - source) / 2).square().mean().log10())


def test_held_out_frames_come_back(held_out_clip_BCTHW: torch.Tensor) -> None:
    """A portrait that neither was trained on; the image VAE's decoder shows the video VAE's latents, too."""
    image, video = load_image_vae(shipped_checkpoint("tiny-image-vae")), load_vae(shipped_checkpoint("tiny-cvvae"))
    clip_BCTHW = held_out_clip_BCTHW
    with torch.no_grad():
        frame = clip_BCTHW[:, :, 0]
        assert psnr(image.vae.decode(image.vae.encode(frame)[:, :4]), frame) > 27
        latents_BCTHW = video.encode(clip_BCTHW).mean
        assert psnr(video.decode(latents_BCTHW), clip_BCTHW) > 26
        assert psnr(image.vae.decode(latents_BCTHW[:, :, 0]), frame) > 25


@pytest.fixture(scope="module")
def held_out_clip_BCTHW(real_clips: dict[str, Path]) -> torch.Tensor:
    """Nine frames of 256 x 256 in [-1, 1]."""
    import av
    import numpy as np

    frames = []
    with av.open(str(real_clips["WolfgangLanger_Pexels.mp4"])) as container:
        for frame in container.decode(video=0):
            frames.append(frame.reformat(456, 256, format="rgb24", interpolation="AREA").to_ndarray()[:, 100:356])
            if len(frames) == 9:
                break
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*tiny-image-vae, tiny-cvvae, got 'x'"):
        shipped_checkpoint("x")
