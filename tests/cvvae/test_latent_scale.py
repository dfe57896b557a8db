"""Standardised latents: the promised mean and spread, and the same pictures."""

import pytest
import torch

from cvvae.image_vae import ImageVAE
from cvvae.latent_scale import standardize_latents


def image_vae() -> ImageVAE:
    torch.manual_seed(0)
    return ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32)).eval()


def test_latents_get_the_promised_mean_and_spread_and_pictures_stay() -> None:
    vae, frames = image_vae(), torch.rand(3, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(frames)
        decoded = vae.decode(moments[:, :4])
        standardize_latents(vae, [frames[:1], frames[1:]], scaling_factor=0.25, shift_factor=0.5)
        mean, logvar = vae.encode(frames).chunk(2, dim=1)
        by_channel = mean.transpose(0, 1).flatten(1)
        torch.testing.assert_close(by_channel.mean(1), torch.full((4,), 0.5), atol=1e-4, rtol=0)
        torch.testing.assert_close(by_channel.std(1, correction=0), torch.full((4,), 4.0), atol=1e-4, rtol=0)
        torch.testing.assert_close(vae.decode(mean), decoded, atol=1e-5, rtol=0)
        # a standard deviation grows as its channel does
        grown = (logvar - moments[:, 4:]).exp().sqrt()
        expected = mean.transpose(0, 1).flatten(1).std(1) / moments[:, :4].transpose(0, 1).flatten(1).std(1)
        torch.testing.assert_close(grown, expected.view(1, 4, 1, 1).expand_as(grown), rtol=1e-4, atol=0)


def test_a_constant_channel_is_refused() -> None:
    vae = image_vae()
    with torch.no_grad():
        vae.quant_conv.weight[2] = 0.0
    with pytest.raises(ValueError, match="each channel to vary"):
        standardize_latents(vae, [torch.rand(1, 3, 16, 16)], scaling_factor=1.0)
