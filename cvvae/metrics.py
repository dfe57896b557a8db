"""How close a decoded video is to its source: PSNR, SSIM, information preservation, and who stands where in a group.

Every measure takes two tensors of one shape (B, C, T, H, W), floating point, values in [0, 1]; `to_unit_range` makes
them of a VAE's pixels. Nothing is rounded to 8 bits: the papers measured here do not say that they do.

Sources: SSIM of Wang et al. 2004 as OD-VAE's and WF-VAE's evaluation computes it (11 x 11 Gaussian of sigma 1.5, each
channel apart, only where the window fits, float64); information preservation and quality by position in a group of
frames: IV-VAE (arXiv 2411.06449), appendix A.1 and A.2.
"""

import math

import torch
from torch import Tensor

from cvvae.spec import VAESpec

PSNR_CEILING = 100.0
"""dB given for an error below what float32 holds of [0, 1]; equal frames have it too, so that means stay finite."""
SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def to_unit_range(video: Tensor, pixel_range: tuple[float, float]) -> Tensor:
    """Pixels in `pixel_range` -> float32 in [0, 1]; what lies outside is clamped, as it would be to show it."""
    low, high = pixel_range
    return ((video.float() - low) / (high - low)).clamp(0.0, 1.0)


def psnr_of_frames(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Tensor:
    """(B, T) in dB, peak 1, the error averaged over a frame; their mean is what OD-VAE and IV-VAE report.

    At most PSNR_CEILING. ValueError if the shapes differ.
    """
    return _decibels(_squared_error(decoded_BCTHW, source_BCTHW).mean(dim=(1, 3, 4)))


def psnr_of_videos(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Tensor:
    """(B,) in dB, the error averaged over the whole video: never above the mean of `psnr_of_frames`."""
    return _decibels(_squared_error(decoded_BCTHW, source_BCTHW).mean(dim=(1, 2, 3, 4)))


def ssim_of_frames(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Tensor:
    """(B, T) mean structural similarity of each frame, at most 1. ValueError if a side is below 11 pixels.

    One frame at a time, so that memory does not grow with the video.
    """
    _require_pair(decoded_BCTHW, source_BCTHW)
    height, width = source_BCTHW.shape[-2:]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(f"SSIM: expected frames of at least {SSIM_WINDOW} pixels a side, got {height} x {width}")
    pairs = zip(decoded_BCTHW.unbind(2), source_BCTHW.unbind(2), strict=True)
    return torch.stack([_ssim(decoded.double(), source.double()) for decoded, source in pairs], dim=1)


def information_preservation(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Tensor:
    """(B,) 1 - sum |x - x'| / sum |x| over all pixels of a video (IV-VAE, A.1); 1 is no loss.

    The paper does not state the range of x; here it is [0, 1]. NaN for a source that is black throughout, of which
    no share can be kept.
    """
    _require_pair(decoded_BCTHW, source_BCTHW)
    dims = (1, 2, 3, 4)
    lost = (decoded_BCTHW - source_BCTHW).abs().sum(dim=dims, dtype=torch.float64)
    whole = source_BCTHW.abs().sum(dim=dims, dtype=torch.float64)
    return torch.where(whole > 0, 1 - lost / whole, torch.nan)


def group_positions(spec: VAESpec, num_frames: int) -> tuple[int | None, ...]:
    """For each frame of a video its position among those that one latent frame stands for (IV-VAE, A.2).

    None for a frame that has a latent of its own where others share one: it is not compared with them. ValueError on
    a length that the VAE does not take.
    """
    positions: list[int | None] = [None] * num_frames
    for latent_frame in range(spec.num_latent_frames(num_frames)):
        start, stop = spec.frame_span(latent_frame)
        if stop - start > 1 or spec.time_stride == 1:
            positions[start:stop] = range(stop - start)
    return tuple(positions)


def _squared_error(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Tensor:
    _require_pair(decoded_BCTHW, source_BCTHW)
    return (decoded_BCTHW - source_BCTHW).square().double()


def _decibels(mean_squared_error: Tensor) -> Tensor:
    floor = 10 ** (-PSNR_CEILING / 10)
    return -10 * mean_squared_error.clamp_min(floor).log10()


def _ssim(x_BCHW: Tensor, y_BCHW: Tensor) -> Tensor:
    """(B,) over channels and places. Wang et al. 2004, equation 13, with the weights of its section III-C."""
    mean_x, mean_y = _blurred(x_BCHW), _blurred(y_BCHW)
    variance_x = _blurred(x_BCHW * x_BCHW) - mean_x * mean_x
    variance_y = _blurred(y_BCHW * y_BCHW) - mean_y * mean_y
    covariance = _blurred(x_BCHW * y_BCHW) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x * mean_x + mean_y * mean_y + _C1)
    structure = (2 * covariance + _C2) / (variance_x + variance_y + _C2)
    return (luminance * structure).mean(dim=(1, 2, 3))


def _blurred(x_BCHW: Tensor) -> Tensor:
    """Weighted means under the window, where it fits: (B, C, H - 10, W - 10).

    Sums of shifted pictures, down and then across: torch has no quick convolution of float64 on a CPU.
    """
    weights = [math.exp(-((place - SSIM_WINDOW // 2) ** 2) / (2 * SSIM_SIGMA**2)) for place in range(SSIM_WINDOW)]
    for dim in (2, 3):
        size = x_BCHW.shape[dim] - SSIM_WINDOW + 1
        blurred = torch.zeros_like(x_BCHW.narrow(dim, 0, size))
        for place, weight in enumerate(weights):
            blurred.add_(x_BCHW.narrow(dim, place, size), alpha=weight / sum(weights))
        x_BCHW = blurred
    return x_BCHW


def _require_pair(decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> None:
    if decoded_BCTHW.ndim != 5 or decoded_BCTHW.shape != source_BCTHW.shape:
        raise ValueError(
            f"expected two videos of one shape (B, C, T, H, W), got {tuple(decoded_BCTHW.shape)} (decoded) and "
            f"{tuple(source_BCTHW.shape)} (source)"
        )
