"""I3D trained on Kinetics-400 (Carreira and Zisserman 2017): the network whose logits FVD compares.

FVD (Unterthiner et al. 2018, arXiv 1812.01717) is the Frechet distance between the 400 logits of two sets of videos.
The weights are DeepMind's i3d-kinetics-400 with batch norms folded into the convolutions; `load_i3d` reads the file
that `jobs/convert_metric_weights.py` makes.
"""

import math
import os
from itertools import product
from typing import Literal

import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.weights import check_tensors

NUM_LOGITS = 400
SIDE = 224
MIN_FRAMES = 9
"""The last pool spans two of the time steps that are left, each of eight frames."""
FVDResize = Literal["short-side", "whole"]
"""short-side: the short side to 224 (bilinear, pixel centres), then the centre square, as StyleGAN-V's descendants
(WF-VAE, OD-VAE) do. whole: the whole frame to 224 x 224 whatever its shape, bilinear between corners of TensorFlow 1,
as FVD's authors do."""

_BRANCHES = (
    # name, which of the module's widths are its inputs (-1: the module's own input) and outputs, kernel
    ("Branch_0.Conv3d_0a_1x1", -1, 0, 1),
    ("Branch_1.Conv3d_0a_1x1", -1, 1, 1),
    ("Branch_1.Conv3d_0b_3x3", 1, 2, 3),
    ("Branch_2.Conv3d_0a_1x1", -1, 3, 1),
    ("Branch_2.Conv3d_0b_3x3", 3, 4, 3),
    ("Branch_3.Conv3d_0b_1x1", -1, 5, 1),
)
_MIXED = {
    "Mixed_3b": (64, 96, 128, 16, 32, 32),
    "Mixed_3c": (128, 128, 192, 32, 96, 64),
    "Mixed_4b": (192, 96, 208, 16, 48, 64),
    "Mixed_4c": (160, 112, 224, 24, 64, 64),
    "Mixed_4d": (128, 128, 256, 24, 64, 64),
    "Mixed_4e": (112, 144, 288, 32, 64, 64),
    "Mixed_4f": (256, 160, 320, 32, 128, 128),
    "Mixed_5b": (256, 160, 320, 32, 128, 128),
    "Mixed_5c": (384, 192, 384, 48, 128, 128),
}
_POOL_BEFORE = {
    "Mixed_3b": ((1, 3, 3), (1, 2, 2)),
    "Mixed_4b": ((3, 3, 3), (2, 2, 2)),
    "Mixed_5b": ((2, 2, 2), (2, 2, 2)),
}


class I3D(nn.Module):
    """Videos to logits. Layers have DeepMind's names."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv3d_1a_7x7 = nn.Conv3d(3, 64, 7, stride=2)
        self.Conv3d_2b_1x1 = nn.Conv3d(64, 64, 1)
        self.Conv3d_2c_3x3 = nn.Conv3d(64, 192, 3)
        channels = 192
        for name, widths in _MIXED.items():
            self.add_module(name, _Mixed(channels, widths))
            channels = widths[0] + widths[2] + widths[4] + widths[5]
        self.Logits = nn.Conv3d(channels, NUM_LOGITS, 1)

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        """(B, 3, T, 224, 224) in [-1, 1], T >= 9 -> logits (B, 400). ValueError on another shape."""
        if video_BCTHW.ndim != 5 or video_BCTHW.shape[1] != 3 or tuple(video_BCTHW.shape[-2:]) != (SIDE, SIDE):
            raise ValueError(f"I3D: expected (B, 3, T, {SIDE}, {SIDE}), got {tuple(video_BCTHW.shape)}")
        if video_BCTHW.shape[2] < MIN_FRAMES:
            raise ValueError(f"I3D: expected at least {MIN_FRAMES} frames, got {video_BCTHW.shape[2]}")
        x = _unit(self.Conv3d_1a_7x7, video_BCTHW)
        x = _max_pool(x, (1, 3, 3), (1, 2, 2))
        x = _unit(self.Conv3d_2c_3x3, _unit(self.Conv3d_2b_1x1, x))
        for name in _MIXED:
            if name in _POOL_BEFORE:
                x = _max_pool(x, *_POOL_BEFORE[name])
            x = self.get_submodule(name)(x)
        x = F.avg_pool3d(x, (2, 7, 7), stride=1)
        return self.Logits(x).mean(dim=(2, 3, 4))


class _Mixed(nn.Module):
    """Four branches side by side (Inception)."""

    def __init__(self, channels: int, widths: tuple[int, ...]) -> None:
        super().__init__()
        for number in range(4):
            self.add_module(f"Branch_{number}", nn.Module())
        for name, width_in, width_out, kernel in _BRANCHES:
            branch, _, layer = name.partition(".")
            inputs = channels if width_in < 0 else widths[width_in]
            self.get_submodule(branch).add_module(layer, nn.Conv3d(inputs, widths[width_out], kernel))

    def forward(self, x: Tensor) -> Tensor:
        conv = {name: self.get_submodule(name) for name, *_ in _BRANCHES}
        return torch.cat(
            [
                _unit(conv["Branch_0.Conv3d_0a_1x1"], x),
                _unit(conv["Branch_1.Conv3d_0b_3x3"], _unit(conv["Branch_1.Conv3d_0a_1x1"], x)),
                _unit(conv["Branch_2.Conv3d_0b_3x3"], _unit(conv["Branch_2.Conv3d_0a_1x1"], x)),
                _unit(conv["Branch_3.Conv3d_0b_1x1"], _max_pool(x, (3, 3, 3), (1, 1, 1))),
            ],
            dim=1,
        )


def _unit(conv: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(conv, nn.Conv3d)
    return F.relu(conv(_padded_same(x, conv.kernel_size, conv.stride, value=0.0)))


def _max_pool(x: Tensor, kernel: tuple[int, int, int], stride: tuple[int, int, int]) -> Tensor:
    return F.max_pool3d(_padded_same(x, kernel, stride, value=-math.inf), kernel, stride)


def _padded_same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], *, value: float) -> Tensor:
    """TensorFlow's SAME: as many outputs as strides fit, the odd element of padding behind."""
    padding: list[int] = []
    for size, width, step in reversed(list(zip(x.shape[2:], kernel, stride, strict=True))):
        total = max((math.ceil(size / step) - 1) * step + width - size, 0)
        padding += [total // 2, total - total // 2]
    return F.pad(x, padding, value=value) if any(padding) else x


def fvd_input(video_BCTHW: Tensor, resize: FVDResize = "short-side") -> Tensor:
    """(B, 3, T, H, W) in [0, 1] -> (B, 3, T, 224, 224) in [-1, 1]."""
    batch, _, num_frames, height, width = video_BCTHW.shape
    frames_NCHW = video_BCTHW.transpose(1, 2).flatten(0, 1)
    if resize == "whole":
        frames_NCHW = _between_corners(_between_corners(frames_NCHW, SIDE, dim=2), SIDE, dim=3)
    else:
        ratio = SIDE / min(height, width)
        size = tuple(SIDE if side == min(height, width) else math.ceil(side * ratio) for side in (height, width))
        frames_NCHW = F.interpolate(frames_NCHW, size, mode="bilinear", align_corners=False)
        top, left = ((side - SIDE) // 2 for side in size)
        frames_NCHW = frames_NCHW[:, :, top : top + SIDE, left : left + SIDE]
    return frames_NCHW.unflatten(0, (batch, num_frames)).transpose(1, 2) * 2 - 1


def _between_corners(x: Tensor, size: int, *, dim: int) -> Tensor:
    """Linear resize along one dimension; output k lies at k * old / new, as TensorFlow 1's resize_bilinear has it."""
    old = x.shape[dim]
    places = torch.arange(size, device=x.device, dtype=torch.float64) * (old / size)
    below = places.floor().long()
    above = (below + 1).clamp_max(old - 1)
    shape = [1] * x.ndim
    shape[dim] = size
    weight = (places - below).to(x.dtype).view(shape)
    return x.index_select(dim, below) * (1 - weight) + x.index_select(dim, above) * weight


def layer_names() -> tuple[str, ...]:
    """Every convolution with a batch norm in the original, by its name here; the logits' layer has none."""
    mixed = (f"{module}.{branch}" for module, (branch, *_) in product(_MIXED, _BRANCHES))
    return ("Conv3d_1a_7x7", "Conv3d_2b_1x1", "Conv3d_2c_3x3", *mixed)


def load_i3d(path: str | os.PathLike[str]) -> I3D:
    """A converted file as a frozen module, float32 on the CPU. ValueError if keys or shapes do not match."""
    with torch.device("meta"):
        module = I3D()
    tensors = safetensors.torch.load_file(path)
    check_tensors(tensors, module, where=str(path))
    module.load_state_dict(tensors, assign=True)
    return module.eval().requires_grad_(False)
