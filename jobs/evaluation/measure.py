"""One window through every VAE: decode-back, and every figure of it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from cvvae import VideoVAE
from cvvae.i3d import I3D, FVDResize, fvd_input
from cvvae.lpips import LPIPS
from cvvae.metrics import (
    information_preservation,
    psnr_of_frames,
    psnr_of_videos,
    ssim_of_frames,
    to_unit_range,
)
from jobs.evaluation.clips import SourceWindow
from jobs.evaluation.presets import Metric

Posterior = Literal["mode", "sample"]
_LPIPS_PIXELS = 1 << 22
"""Pixels of one LPIPS batch: a first layer's features are 64 floats for each (VGG)."""


class NonFinite(ValueError):
    """A VAE gave NaN or infinity; the message says which."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One VAE on one window. `frames` has a list with a value per frame for psnr, ssim and lpips where measured."""

    values: dict[Metric, float]
    frames: dict[Metric, list[float]]
    features_D: Tensor | None = None
    """I3D's logits of the decoded window."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A window, what each VAE made of it (uint8, as it would be shown), and how good that is."""

    window: SourceWindow
    figures: dict[str, Figures]
    decoded_THWC: dict[str, np.ndarray]
    source_features_D: Tensor | None = None
    latents_BCTHW: dict[str, Tensor] = field(default_factory=dict)
    """What was decoded, raw, by VAE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measure:
    """Runs VAEs on windows. All of it is a function of the window, the VAEs and the seed."""

    vaes: Mapping[str, VideoVAE]
    metrics: Sequence[Metric]
    lpips: LPIPS | None = None
    i3d: I3D | None = None
    fvd_resize: FVDResize = "short-side"
    posterior: Posterior = "mode"
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @torch.inference_mode()
    def __call__(self, window: SourceWindow) -> Measured:
        """NonFinite if a VAE gives such numbers: the window then counts for none, so that all see the same."""
        source_BCTHW = window_pixels(window, self.device)
        latents: dict[str, Tensor] = {}
        figures: dict[str, Figures] = {}
        shown: dict[str, np.ndarray] = {}
        for label, vae in self.vaes.items():
            latents[label] = self._encode(vae, source_BCTHW, window.key)
            decoded_BCTHW = self._decode(label, vae, latents[label])
            figures[label] = self._figures(decoded_BCTHW, source_BCTHW)
            eight_bit_CTHW = (decoded_BCTHW[0] * 255).round().to(torch.uint8)
            shown[label] = eight_bit_CTHW.permute(1, 2, 3, 0).cpu().numpy()
        return Measured(window, figures, shown, self._features(source_BCTHW), latents)

    def _encode(self, vae: VideoVAE, source_BCTHW: Tensor, key: str) -> Tensor:
        low, high = vae.spec.pixel_range
        posterior = vae.encode((source_BCTHW * (high - low) + low).to(vae.dtype))
        if self.posterior == "mode":
            return posterior.mode()
        # the same noise for a window whatever was measured before it
        seed = zlib.crc32(key.encode("utf-8", "surrogatepass")) ^ self.seed
        return posterior.sample(torch.Generator(self.device).manual_seed(seed))

    @staticmethod
    def _decode(label: str, vae: VideoVAE, latent_BCTHW: Tensor) -> Tensor:
        decoded_BCTHW = vae.decode(latent_BCTHW)
        if not torch.isfinite(decoded_BCTHW).all():
            raise NonFinite(f"{label} decoded NaN or infinity in {vae.dtype}")
        return to_unit_range(decoded_BCTHW, vae.spec.pixel_range)

    def _figures(self, decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> Figures:
        frames: dict[Metric, list[float]] = {}
        if "psnr" in self.metrics:
            frames["psnr"] = psnr_of_frames(decoded_BCTHW, source_BCTHW)[0].tolist()
        if "ssim" in self.metrics:
            frames["ssim"] = ssim_of_frames(decoded_BCTHW, source_BCTHW)[0].tolist()
        if "lpips" in self.metrics:
            frames["lpips"] = self._lpips_of_frames(decoded_BCTHW, source_BCTHW)
        values: dict[Metric, float] = {metric: sum(each) / len(each) for metric, each in frames.items()}
        if "psnr_video" in self.metrics:
            values["psnr_video"] = float(psnr_of_videos(decoded_BCTHW, source_BCTHW))
        if "information" in self.metrics:
            values["information"] = float(information_preservation(decoded_BCTHW, source_BCTHW))
        return Figures(values, frames, self._features(decoded_BCTHW))

    def _lpips_of_frames(self, decoded_BCTHW: Tensor, source_BCTHW: Tensor) -> list[float]:
        assert self.lpips is not None
        first_NCHW, second_NCHW = (video[0].transpose(0, 1) * 2 - 1 for video in (decoded_BCTHW, source_BCTHW))
        batch = max(1, _LPIPS_PIXELS // (first_NCHW.shape[-1] * first_NCHW.shape[-2]))
        pairs = zip(first_NCHW.split(batch), second_NCHW.split(batch), strict=True)
        return [value for first, second in pairs for value in self.lpips(first, second).tolist()]

    def _features(self, video_BCTHW: Tensor) -> Tensor | None:
        if self.i3d is None or "fvd" not in self.metrics:
            return None
        return self.i3d(fvd_input(video_BCTHW, self.fvd_resize))[0].cpu()


def window_pixels(window: SourceWindow, device: torch.device) -> Tensor:
    """The window as (1, 3, T, H, W), float [0, 1]."""
    # a copy: the window's memory is read-only and torch would complain
    frames_THWC = torch.from_numpy(window.frames_THWC.copy()).to(device)
    return frames_THWC.permute(3, 0, 1, 2)[None].float() / 255
