"""PSNR, SSIM and information preservation against formulas written out in numpy and scipy."""

import math

import numpy as np
import pytest
import torch
from scipy.signal import convolve2d

from cvvae import SPECS
from cvvae.metrics import (
    PSNR_CEILING,
    group_positions,
    information_preservation,
    psnr_of_frames,
    psnr_of_videos,
    ssim_of_frames,
    to_unit_range,
)


@pytest.fixture(scope="module")
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    """A smooth video of two clips and a noisy copy, (2, 3, 4, 20, 27) in [0, 1]."""
    generator = torch.Generator().manual_seed(3)
    source = torch.rand(2, 3, 4, 5, 7, generator=generator)
    source = torch.nn.functional.interpolate(source, (4, 20, 27), mode="trilinear")
    return (source + 0.1 * torch.randn(source.shape, generator=generator)).clamp(0, 1), source


def test_psnr_of_frames_and_videos_follow_the_formula(pair) -> None:
    decoded, source = pair
    error = (decoded.double() - source.double()).numpy() ** 2
    frames = 20 * np.log10(1 / np.sqrt(error.mean(axis=(1, 3, 4))))
    videos = 10 * np.log10(1 / error.mean(axis=(1, 2, 3, 4)))
    np.testing.assert_allclose(psnr_of_frames(decoded, source), frames, rtol=1e-6)
    np.testing.assert_allclose(psnr_of_videos(decoded, source), videos, rtol=1e-6)
    assert (psnr_of_videos(decoded, source) <= psnr_of_frames(decoded, source).mean(dim=1)).all()


def test_psnr_of_a_known_error() -> None:
    source = torch.full((1, 3, 2, 12, 12), 0.5)
    decoded = source.clone()
    decoded[:, :, 1] += 0.1
    assert psnr_of_frames(decoded, source)[0].tolist() == pytest.approx([PSNR_CEILING, 20.0], abs=1e-4)
    assert psnr_of_videos(decoded, source).item() == pytest.approx(20 + 10 * math.log10(2), abs=1e-4)


def reference_ssim(x_HW: np.ndarray, y_HW: np.ndarray) -> float:
    """One channel, with a full 2-D window and two-pass statistics about the local means."""
    offsets = np.arange(11) - 5
    window = np.exp(-(offsets[:, None] ** 2 + offsets[None, :] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    mean_x, mean_y = (convolve2d(image, window, mode="valid") for image in (x_HW, y_HW))
    height, width = mean_x.shape
    total = 0.0
    for row in range(height):
        for column in range(width):
            x = x_HW[row : row + 11, column : column + 11] - mean_x[row, column]
            y = y_HW[row : row + 11, column : column + 11] - mean_y[row, column]
            variances = (window * x * x).sum() + (window * y * y).sum()
            covariance = (window * x * y).sum()
            m_x, m_y = mean_x[row, column], mean_y[row, column]
            total += ((2 * m_x * m_y + 1e-4) / (m_x**2 + m_y**2 + 1e-4)) * (
                (2 * covariance + 9e-4) / (variances + 9e-4)
            )
    return total / (height * width)


def test_ssim_against_the_formula_with_a_full_window(pair) -> None:
    decoded, source = pair
    got = ssim_of_frames(decoded, source)
    assert got.shape == (2, 4)
    for clip, frame in ((0, 0), (1, 3)):
        x, y = (video[clip, :, frame].double().numpy() for video in (decoded, source))
        expected = np.mean([reference_ssim(x[channel], y[channel]) for channel in range(3)])
        assert got[clip, frame].item() == pytest.approx(expected, rel=1e-9)


def test_ssim_of_equal_frames_is_one_and_falls_with_noise(pair) -> None:
    decoded, source = pair
    assert ssim_of_frames(source, source).min().item() == pytest.approx(1.0, abs=1e-12)
    assert ssim_of_frames(decoded, source).max() < 0.95


def test_ssim_refuses_frames_smaller_than_its_window() -> None:
    small = torch.zeros(1, 3, 1, 10, 30)
    with pytest.raises(ValueError, match="at least 11 pixels a side, got 10 x 30"):
        ssim_of_frames(small, small)


def test_information_preservation(pair) -> None:
    decoded, source = pair
    x, y = decoded.double().numpy(), source.double().numpy()
    expected = 1 - np.abs(x - y).sum(axis=(1, 2, 3, 4)) / np.abs(y).sum(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(information_preservation(decoded, source), expected, rtol=1e-6)
    assert information_preservation(source, source).tolist() == [1.0, 1.0]
    assert information_preservation(torch.zeros_like(source), source).tolist() == [0.0, 0.0]
    assert math.isnan(information_preservation(torch.ones(1, 3, 1, 8, 8), torch.zeros(1, 3, 1, 8, 8)).item())


@pytest.mark.parametrize("measure", [psnr_of_frames, psnr_of_videos, ssim_of_frames, information_preservation])
def test_shapes_must_agree(measure) -> None:
    with pytest.raises(ValueError, match=r"one shape .*\(1, 3, 5, 16, 16\) .decoded. and \(1, 3, 4, 16, 16\)"):
        measure(torch.zeros(1, 3, 5, 16, 16), torch.zeros(1, 3, 4, 16, 16))


def test_unit_range_clamps_what_cannot_be_shown() -> None:
    got = to_unit_range(torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]), (-1.0, 1.0))
    assert got.tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert to_unit_range(torch.tensor([0.25], dtype=torch.bfloat16), (0.0, 1.0)).dtype == torch.float32


def test_group_positions_leave_out_the_first_frame() -> None:
    assert group_positions(SPECS["cvvae-sd21"], 9) == (None, 0, 1, 2, 3, 0, 1, 2, 3)
    assert group_positions(SPECS["ivvae-z4-tiny"], 1) == (None,)


@pytest.mark.parametrize("name", sorted(name for name in SPECS if name.endswith("-tiny")))
def test_every_family_has_positions_for_all_frames_that_share_a_latent(name: str) -> None:
    spec = SPECS[name]
    num_frames = spec.largest_valid_num_frames(17)
    positions = group_positions(spec, num_frames)
    assert len(positions) == num_frames
    counts = [positions.count(position) for position in range(spec.time_stride)]
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_group_positions_refuse_a_length_the_vae_does_not_take() -> None:
    with pytest.raises(ValueError, match="nearest shorter is 5"):
        group_positions(SPECS["cvvae-sd21"], 6)
