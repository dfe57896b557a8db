"""Where an image VAE starts when it is trained from nothing: as a box filter that shrinks and enlarges its pictures.

Group norms take the level and contrast of a whole channel away, so that a network of them from random weights spends
its first thousands of steps on getting colours through at all. Here the residual blocks start as nothing and the
path between them passes colours. Each colour has a group of channels (x, -x, 1, -1, ...): its mean is 0 and its
spread is that of the constants, so a group norm leaves it as it is, up to a factor; and silu(x) - silu(-x) = x.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from cvvae.image_vae import ImageVAE
from cvvae.layers import ResBlock, SpatialAttention

_GAIN = 0.25
"""Of a colour against the constants: small, so that the spread of its group hardly depends on it."""
_START_LOGVAR = 2 * math.log(0.05)
"""A posterior with standard deviation 0.05, against latents of about 1."""


@torch.no_grad()
def start_as_box_filter(vae: ImageVAE) -> None:
    """Overwrite what decides the first reconstructions; all other weights stay random, so that blocks can learn.

    Latent channel c is colour c, averaged over each block of pixels; further latent channels start random. ValueError
    unless there is a group of at least four channels for each colour at every level, and a latent channel.
    """
    colours, groups = vae.in_channels, vae.norm_groups
    if groups < colours or vae.latent_channels < colours or min(vae.widths) < 4 * groups:
        raise ValueError(
            f"expected at least {colours} norm groups of 4 channels and {colours} latent channels, got widths "
            f"{vae.widths} in {groups} groups and {vae.latent_channels} latent channels"
        )
    for module in vae.modules():
        if isinstance(module, ResBlock):
            _silence(module.conv2)
        elif isinstance(module, SpatialAttention):
            _silence(module.get_submodule(module.names.out))
    for name, conv in vae.named_modules():
        if name.endswith("conv_shortcut"):
            _pass_on(conv, colours, groups)
        elif name.endswith("downsamplers.0.conv"):
            _pass_on(conv, colours, groups, taps=(0, 1))
        elif name.endswith("upsamplers.0.conv"):
            _pass_on(conv, colours, groups, taps=(1,))
    _enter(vae.encoder.get_submodule("conv_in"), colours, groups)
    _enter(vae.decoder.get_submodule("conv_in"), colours, groups)
    _leave(vae.encoder.get_submodule("conv_out"), vae.widths[-1], colours, groups)
    _leave(vae.decoder.get_submodule("conv_out"), vae.widths[0], colours, groups)
    for quant in (vae.quant_conv, vae.post_quant_conv):
        nn.init.dirac_(quant.weight)
        nn.init.zeros_(_bias(quant))
    vae.quant_conv.weight[vae.latent_channels :] = 0.0
    _bias(vae.quant_conv)[vae.latent_channels :] = _START_LOGVAR


def _silence(layer: nn.Module) -> None:
    assert isinstance(layer, nn.Conv2d | nn.Linear | nn.Conv3d)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))


def _bias(layer: nn.Module) -> Tensor:
    bias = layer.bias
    assert isinstance(bias, Tensor)
    return bias


def _constants(size: int) -> Tensor:
    """Of a colour's group: none for x and -x, then 1 and -1 in turn."""
    signs = torch.tensor([1.0, -1.0]).repeat(size // 2)[:size]
    signs[:2] = 0.0
    return signs


def _clear(conv: nn.Module, colours: int, groups: int) -> tuple[nn.Conv2d, int]:
    """The convolution with the rows of the colours' groups set to their constants, and the size of a group."""
    assert isinstance(conv, nn.Conv2d)
    size = conv.out_channels // groups
    conv.weight[: colours * size] = 0.0
    _bias(conv)[: colours * size] = _constants(size).repeat(colours)
    return conv, size


def _pass_on(conv: nn.Module, colours: int, groups: int, *, taps: tuple[int, ...] = (0,)) -> None:
    """x to x and -x to -x, averaged over the kernel's `taps` of both axes."""
    conv, size = _clear(conv, colours, groups)
    before = conv.in_channels // groups
    for colour in range(colours):
        for sign in range(2):
            for row in taps:
                for column in taps:
                    conv.weight[colour * size + sign, colour * before + sign, row, column] = 1.0 / len(taps) ** 2


def _enter(conv: nn.Module, colours: int, groups: int) -> None:
    """A colour (or its latent channel) to x and -x of its group."""
    conv, size = _clear(conv, colours, groups)
    middle = conv.kernel_size[0] // 2
    for colour in range(colours):
        conv.weight[colour * size, colour, middle, middle] = _GAIN
        conv.weight[colour * size + 1, colour, middle, middle] = -_GAIN


def _leave(conv: nn.Module, width: int, colours: int, groups: int) -> None:
    """What comes out of the norm and the SiLU back to the colour: the inverse of `_enter` for colours of 0.5."""
    assert isinstance(conv, nn.Conv2d)
    size = width // groups
    spread = math.sqrt((2 * (0.5 * _GAIN) ** 2 + (size - 2)) / size)
    middle = conv.kernel_size[0] // 2
    conv.weight[:colours] = 0.0
    _bias(conv)[:colours] = 0.0
    for colour in range(colours):
        conv.weight[colour, colour * size, middle, middle] = spread / _GAIN
        conv.weight[colour, colour * size + 1, middle, middle] = -spread / _GAIN
