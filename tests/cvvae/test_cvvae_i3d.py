"""I3D's padding, layers and input against loops in numpy; its weights' conversion is tested with the converter."""

import math

import numpy as np
import pytest
import torch

from cvvae.i3d import I3D, NUM_LOGITS, _max_pool, _padded_same, fvd_input, layer_names


@pytest.mark.parametrize("size", [7, 8, 9, 15, 16])
@pytest.mark.parametrize(("kernel", "stride"), [(7, 2), (3, 2), (3, 1), (2, 2)])
def test_same_padding_is_tensorflows(size: int, kernel: int, stride: int) -> None:
    """TensorFlow's formula, written out: as many outputs as strides begin, the odd element behind."""
    x = torch.arange(1.0, size + 1).view(1, 1, size, 1, 1)
    padded = _padded_same(x, (kernel, 1, 1), (stride, 1, 1), value=0.0).flatten().tolist()
    outputs = -(-size // stride)
    total = max(kernel - stride if size % stride == 0 else kernel - size % stride, 0)
    assert padded == [0.0] * (total // 2) + list(range(1, size + 1)) + [0.0] * (total - total // 2)
    assert (len(padded) - kernel) // stride + 1 == outputs


def test_a_padded_pool_never_takes_the_padding() -> None:
    x = -torch.ones(1, 2, 3, 5, 5)
    assert _max_pool(x, (3, 3, 3), (2, 2, 2)).unique().tolist() == [-1.0]


@torch.no_grad()
def test_logits_of_the_shortest_and_a_longer_video() -> None:
    torch.manual_seed(0)
    network = I3D().eval()
    # published ports with batch norms of scale and shift have 12,697,264: 7,280 scales are not there
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264 - 7_280
    video = torch.rand(1, 3, 9, 224, 224) * 2 - 1
    logits = network(video)
    assert logits.shape == (1, NUM_LOGITS)
    assert torch.isfinite(logits).all()
    with pytest.raises(ValueError, match="at least 9 frames, got 8"):
        network(video[:, :, :8])
    with pytest.raises(ValueError, match=r"expected \(B, 3, T, 224, 224\), got \(1, 3, 9, 224, 223\)"):
        network(video[..., :223])


def test_layer_names_are_those_of_the_module_less_the_logits() -> None:
    convolutions = {name for name, module in I3D().named_modules() if isinstance(module, torch.nn.Conv3d)}
    assert convolutions - set(layer_names()) == {"Logits"}
    assert set(layer_names()) <= convolutions


def linear_at(values: np.ndarray, place: float) -> np.ndarray:
    """Between two neighbours along the first axis; clamped at the ends."""
    place = min(max(place, 0.0), len(values) - 1.0)
    below = math.floor(place)
    above = min(below + 1, len(values) - 1)
    return values[below] * (1 - (place - below)) + values[above] * (place - below)


@pytest.mark.parametrize(("height", "width"), [(30, 47), (47, 30), (300, 260), (224, 224)])
def test_short_side_input_follows_pixel_centres_and_the_centre_square(height: int, width: int) -> None:
    frame = np.random.default_rng(5).random((height, width))
    video = torch.from_numpy(frame)[None, None, None].expand(1, 3, 1, -1, -1)
    got = fvd_input(video)[0, 0, 0].numpy()
    ratio = 224 / min(height, width)
    size = [224 if side == min(height, width) else math.ceil(side * ratio) for side in (height, width)]
    top, left = ((side - 224) // 2 for side in size)
    for row, column in ((0, 0), (17, 203), (223, 223)):
        y = (row + top + 0.5) * height / size[0] - 0.5
        x = (column + left + 0.5) * width / size[1] - 0.5
        expected = linear_at(np.array([linear_at(line, x) for line in frame]), y) * 2 - 1
        assert got[row, column] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(30, 47), (300, 260)])
def test_whole_input_follows_tensorflow_ones_corners(height: int, width: int) -> None:
    frame = np.random.default_rng(6).random((height, width))
    video = torch.from_numpy(frame)[None, None, None].expand(1, 3, 1, -1, -1)
    got = fvd_input(video, "whole")[0, 2, 0].numpy()
    for row, column in ((0, 0), (17, 203), (223, 223)):
        rows = np.array([linear_at(line, column * width / 224) for line in frame])
        assert got[row, column] == pytest.approx(linear_at(rows, row * height / 224) * 2 - 1, abs=1e-9)


def test_input_keeps_frames_and_channels_in_place() -> None:
    video = torch.arange(6.0).view(1, 3, 2, 1, 1).expand(1, 3, 2, 224, 224) / 10
    got = fvd_input(video)
    assert got.shape == (1, 3, 2, 224, 224)
    torch.testing.assert_close(got, video * 2 - 1)
