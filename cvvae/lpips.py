"""LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924) over AlexNet or VGG16, in plain torch.

Both images pass a network trained on ImageNet; at five depths the features of each place are scaled to length 1, and
the squared differences are weighted by a learned head. The weights are not part of this package: `load_lpips` reads
a converted file (`jobs/convert_metric_weights.py` makes it).
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.weights import check_tensors

Backbone = Literal["alex", "vgg"]
Averaging = Literal["features", "pixels"]
"""How a head's map becomes a number: its own mean, or the mean after bilinear enlargement to the image's size, which
weights the border differently. The original calls the second one spatial=True; OD-VAE's evaluation uses it."""

# statistics of ImageNet's pixels, for images in [-1, 1] (the original's scaling layer)
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)
_EPSILON = 1e-10


@dataclass(frozen=True, slots=True)
class _Conv:
    """A convolution with ReLU; `pool` comes before it: (kernel, stride) of a max pool."""

    channels: tuple[int, int]
    kernel: int
    stride: int = 1
    pool: tuple[int, int] | None = None
    is_tapped: bool = False


_ALEX = (
    _Conv((3, 64), 11, stride=4, is_tapped=True),
    _Conv((64, 192), 5, pool=(3, 2), is_tapped=True),
    _Conv((192, 384), 3, pool=(3, 2), is_tapped=True),
    _Conv((384, 256), 3, is_tapped=True),
    _Conv((256, 256), 3, is_tapped=True),
)


def _vgg16() -> Iterator[_Conv]:
    before = 3
    for block, (width, length) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        for place in range(length):
            pool = (2, 2) if block and not place else None
            yield _Conv((before, width), 3, pool=pool, is_tapped=place == length - 1)
            before = width


_LAYERS: dict[Backbone, tuple[_Conv, ...]] = {"alex": _ALEX, "vgg": tuple(_vgg16())}


class LPIPS(nn.Module):
    """Perceptual distance of image pairs; 0 for equal ones, larger for more different ones."""

    def __init__(self, backbone: Backbone, *, averaging: Averaging = "features") -> None:
        super().__init__()
        self.averaging = averaging
        self._layers = _LAYERS[backbone]
        self.convs = nn.ModuleList(
            nn.Conv2d(*layer.channels, layer.kernel, stride=layer.stride, padding=2 if layer.kernel > 3 else 1)
            for layer in self._layers
        )
        widths = [layer.channels[1] for layer in self._layers if layer.is_tapped]
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("shift_1311", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale_1311", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)

    def forward(self, first_NCHW: Tensor, second_NCHW: Tensor) -> Tensor:
        """(N,) distances of RGB images in [-1, 1]. ValueError on other shapes, or sides too small for the network."""
        if first_NCHW.ndim != 4 or first_NCHW.shape[1] != 3 or first_NCHW.shape != second_NCHW.shape:
            raise ValueError(
                "LPIPS: expected two batches of images of one shape (N, 3, H, W), got "
                f"{tuple(first_NCHW.shape)} and {tuple(second_NCHW.shape)}"
            )
        if min(first_NCHW.shape[-2:]) < 32:
            raise ValueError(f"LPIPS: expected sides of at least 32 pixels, got {tuple(first_NCHW.shape[-2:])}")
        total = first_NCHW.new_zeros(len(first_NCHW))
        for head, first, second in zip(self.heads, self._taps(first_NCHW), self._taps(second_NCHW), strict=True):
            map_N1HW = head((_unit_length(first) - _unit_length(second)).square())
            if self.averaging == "pixels":
                map_N1HW = F.interpolate(map_N1HW, first_NCHW.shape[-2:], mode="bilinear", align_corners=False)
            total = total + map_N1HW.mean(dim=(1, 2, 3))
        return total

    def _taps(self, images_NCHW: Tensor) -> Iterator[Tensor]:
        x = (images_NCHW - self.get_buffer("shift_1311")) / self.get_buffer("scale_1311")
        for layer, conv in zip(self._layers, self.convs, strict=True):
            if layer.pool is not None:
                x = F.max_pool2d(x, *layer.pool)
            x = F.relu(conv(x))
            if layer.is_tapped:
                yield x


def _unit_length(features_NCHW: Tensor) -> Tensor:
    return features_NCHW / (features_NCHW.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)


def load_lpips(path: str | os.PathLike[str], backbone: Backbone, *, averaging: Averaging = "features") -> LPIPS:
    """A converted file as a frozen module, float32 on the CPU. ValueError if keys or shapes do not match."""
    with torch.device("meta"):
        shapes = LPIPS(backbone)
    tensors = safetensors.torch.load_file(path)
    check_tensors(tensors, shapes, where=str(path))
    module = LPIPS(backbone, averaging=averaging)
    module.load_state_dict(tensors)
    return module.eval().requires_grad_(False)
