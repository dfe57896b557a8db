"""LPIPS against the same network written as the usual numbered list of layers, and its file."""

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from cvvae.lpips import LPIPS, Backbone, load_lpips

ALEX = [64, "P", 192, "P", 384, 256, 256]
VGG = [64, 64, "P", 128, 128, "P", 256, 256, 256, "P", 512, 512, 512, "P", 512, 512, 512]
TAPS: dict[Backbone, tuple[int, ...]] = {"alex": (1, 4, 7, 9, 11), "vgg": (3, 8, 15, 22, 29)}
"""Layers of torchvision's `features` whose output the original LPIPS taps."""


def features_of(backbone: Backbone) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for item in ALEX if backbone == "alex" else VGG:
        if item == "P":
            layers.append(nn.MaxPool2d(3, 2) if backbone == "alex" else nn.MaxPool2d(2, 2))
            continue
        assert isinstance(item, int)
        if backbone == "vgg":
            conv = nn.Conv2d(channels, item, 3, padding=1)
        else:
            kernel, stride, padding = {3: (11, 4, 2), 64: (5, 1, 2)}.get(channels, (3, 1, 1))
            conv = nn.Conv2d(channels, item, kernel, stride=stride, padding=padding)
        layers += [conv, nn.ReLU()]
        channels = item
    return nn.Sequential(*layers)


def reference(module: LPIPS, backbone: Backbone, first: Tensor, second: Tensor, *, enlarge: bool) -> Tensor:
    features = features_of(backbone)
    convs = [layer for layer in features if isinstance(layer, nn.Conv2d)]
    for ours, theirs in zip(module.convs, convs, strict=True):
        theirs.load_state_dict(ours.state_dict())
    shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
    total = torch.zeros(len(first))
    x, y = ((image - shift) / scale for image in (first, second))
    number = 0
    for place, layer in enumerate(features):
        x, y = layer(x), layer(y)
        if place in TAPS[backbone]:
            unit_x, unit_y = (z / torch.linalg.vector_norm(z, dim=1, keepdim=True) for z in (x, y))
            weights = module.heads[number].weight[0, :, 0, 0]
            squares = ((unit_x - unit_y) ** 2 * weights[None, :, None, None]).sum(dim=1, keepdim=True)
            if enlarge:
                squares = nn.Upsample(size=first.shape[-2:], mode="bilinear", align_corners=False)(squares)
            total = total + squares.mean(dim=(1, 2, 3))
            number += 1
    return total


@pytest.fixture(scope="module")
def images() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    first = torch.rand(2, 3, 72, 65, generator=generator) * 2 - 1
    return first, (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp(-1, 1)


@pytest.mark.parametrize("backbone", ["alex", "vgg"])
@pytest.mark.parametrize("averaging", ["features", "pixels"])
@torch.no_grad()
def test_against_the_network_as_a_list_of_layers(backbone, averaging, images) -> None:
    torch.manual_seed(0)
    module = LPIPS(backbone, averaging=averaging)
    for head in module.heads:
        head.weight.abs_()
    expected = reference(module, backbone, *images, enlarge=averaging == "pixels")
    torch.testing.assert_close(module(*images), expected, rtol=1e-5, atol=1e-7)
    assert module(images[0], images[0]).tolist() == [0.0, 0.0]


def test_a_saved_file_comes_back_frozen(tmp_path: Path, images) -> None:
    torch.manual_seed(0)
    module = LPIPS("alex")
    safetensors.torch.save_file(module.state_dict(), tmp_path / "alex.safetensors")
    loaded = load_lpips(tmp_path / "alex.safetensors", "alex")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded(*images), module(*images).detach(), rtol=0, atol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    module = LPIPS("alex")
    with pytest.raises(ValueError, match=r"\(N, 3, H, W\), got \(1, 1, 64, 64\)"):
        module(torch.zeros(1, 1, 64, 64), torch.zeros(1, 1, 64, 64))
    with pytest.raises(ValueError, match="at least 32 pixels"):
        module(torch.zeros(1, 3, 31, 64), torch.zeros(1, 3, 31, 64))
    safetensors.torch.save_file(module.state_dict(), tmp_path / "alex.safetensors")
    with pytest.raises(ValueError, match=r"missing: convs\.10\.bias"):
        load_lpips(tmp_path / "alex.safetensors", "vgg")
