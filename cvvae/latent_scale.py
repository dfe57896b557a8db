"""Latents of an image VAE with the mean and spread that its config promises, without changing what it decodes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from cvvae.image_vae import ImageVAE


@torch.no_grad()
def standardize_latents(
    vae: ImageVAE, frames: Iterable[Tensor], *, scaling_factor: float, shift_factor: float = 0.0
) -> None:
    """Fold one affine map per channel into the two 1x1 convolutions around the latents, in place.

    Afterwards the posterior means of `frames`, tensors (N, 3, H, W) in [-1, 1], have per channel the mean
    `shift_factor` and the standard deviation 1 / `scaling_factor`, so that (z - shift) * scale is what a diffusion
    model expects (latent diffusion, arXiv 2112.10752, section G of the supplement, does this by one factor for all
    channels). Reconstructions stay what they were, to rounding. ValueError if a channel is constant.
    """
    channels = vae.latent_channels
    means = [vae.encode(batch)[:, :channels].double().transpose(0, 1).flatten(1) for batch in frames]
    means_CN = torch.cat(means, dim=1)
    spread_C = means_CN.std(dim=1, correction=0)
    if not (spread_C > 0).all():
        raise ValueError(f"latents: expected each channel to vary, got standard deviations {spread_C.tolist()}")
    factor_C = 1.0 / (scaling_factor * spread_C)
    offset_C = shift_factor - factor_C * means_CN.mean(dim=1)
    encoder, decoder = vae.quant_conv, vae.post_quant_conv
    assert encoder.bias is not None
    assert decoder.bias is not None
    weight, bias = encoder.weight.double(), encoder.bias.double()
    weight[:channels] *= factor_C.view(-1, 1, 1, 1)
    bias[:channels] = bias[:channels] * factor_C + offset_C
    bias[channels:] += 2.0 * factor_C.log()  # the variances follow the means
    back = decoder.weight.double() / factor_C.view(1, -1, 1, 1)
    decoder.bias.copy_(decoder.bias.double() - (back * offset_C.view(1, -1, 1, 1)).sum(dim=(1, 2, 3)))
    decoder.weight.copy_(back)
    encoder.weight.copy_(weight)
    encoder.bias.copy_(bias)
