"""Whether video VAEs speak the latents of an image VAE: one window at a time, a line of figures for each.

The paper's claim (CV-VAE, arXiv 2405.20279, section 3.1) as numbers that it does not give itself. With E and D of the
video VAE (v) and the image VAE (i), X a window and psi a mapping of its frames to latent frames:

    image_decoder   D_i(E_v(X)) against psi(X); its ceiling is D_i(E_i(psi(X))), the image VAE itself
    video_decoder   D_v(E_i(psi(X))) against X: a latent per latent step, decoded into all frames (interpolation);
                    its ceiling is D_i(E_i(X)), an image latent for every frame
    latents         E_v(X) against E_i(psi(X)), normalised as a diffusion model sees them

The lines hold sums that can be added up, so that tables by motion need no latent in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from cvvae import VAESpec, VideoVAE
from cvvae.compatibility import LatentComparison, latent_features
from cvvae.image_vae import ImageVAE
from cvvae.metrics import psnr_of_frames, ssim_of_frames, to_unit_range
from cvvae.regularization import (
    FrameChoice,
    choose_frames,
    decode_images,
    encode_images,
    map_frames,
)
from cvvae.regularization import Mapping as FrameMapping
from jobs.evaluation.measure import NonFinite
from pipeline.errors import ConfigError

COMPARED: dict[FrameMapping, str] = {
    "slice": "frame 0, then the last frame of each group (the authors' X[::4])",
    "average": "frame 0, then the mean of each group's frames",
    "first": "frame 0 alone: says nothing of motion",
}
"""The paper's mappings but the random one, which is a mixture of single frames."""
DEFAULT_MAPPING: FrameMapping = "slice"
"""What single figures and the latents' distances are under: real frames, all of the window's length."""
PAIRS_OF_A_WINDOW = 16
"""Positions of a window, drawn at random, whose pairs of latents are kept for the kernel distance."""

Frames = dict[str, list[float]]
"""Metric -> a value per frame."""


@dataclass(frozen=True, slots=True)
class Judge:
    """The image VAE whose latent space is asked for."""

    label: str
    vae: ImageVAE
    """On the device, in float32."""
    scaling_factor: float
    shift_factor: float
    weights_sha256: str

    def refusal(self, spec: VAESpec) -> str | None:
        """Why latents of that spec cannot be this VAE's at all; None if they can."""
        stride = 2 ** (len(self.vae.widths) - 1)
        if (spec.latent_channels, spec.space_stride) == (self.vae.latent_channels, stride):
            return None
        return (
            f"its latents have {spec.latent_channels} channels at 1/{spec.space_stride} of a side, those of "
            f"{self.label} {self.vae.latent_channels} at 1/{stride}"
        )


class CompatibilityMeasure:
    """Measures windows against one image VAE."""

    def __init__(self, judge: Judge, vaes: Mapping[str, VideoVAE], *, with_ssim: bool, seed: int) -> None:
        """`vaes` by label; those that cannot be compared are left out and noted. ConfigError if none is left."""
        self.judge = judge
        self.refused = {label: why for label, vae in vaes.items() if (why := judge.refusal(vae.spec)) is not None}
        self.vaes = {label: vae for label, vae in vaes.items() if label not in self.refused}
        if not self.vaes:
            reasons = "; ".join(f"{label}: {why}" for label, why in self.refused.items())
            raise ConfigError(f"--image-vae {judge.label}: no VAE to compare with it: {reasons}")
        self._with_ssim = with_ssim
        self._seed = seed

    @property
    def notes(self) -> list[str]:
        """What a reader of the figures must know."""
        notes = [f"{label} is not compared with {self.judge.label}: {why}" for label, why in self.refused.items()]
        ours = (self.judge.scaling_factor, self.judge.shift_factor)
        for label, vae in self.vaes.items():
            its = (vae.spec.scaling_factor, vae.spec.shift_factor)
            if its != ours:
                notes.append(
                    f"{label} states scale and shift {its}, {self.judge.label} {ours}: raw latents are compared, "
                    f"under {self.judge.label}'s"
                )
        return notes

    @torch.inference_mode()
    def __call__(
        self, source_BCTHW: Tensor, latents: Mapping[str, Tensor], key: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Figures of each VAE, ready for JSON, and what can be shown of them: a video of float [0, 1] by caption.

        `source_BCTHW` is one window, float [0, 1]; `latents` what each VAE made of it, raw. NonFinite if a decoder
        gives such numbers.
        """
        window = _Window(self.judge.vae, source_BCTHW)
        figures: dict[str, Any] = {}
        shown: dict[str, Tensor] = {}
        for label, vae in self.vaes.items():
            latent_BCTHW = latents[label].float()
            read_BCTHW = window.decoded(latent_BCTHW)
            # VAEs of one time stride are held against the same frames, and share this picture
            ceiling_BCTHW = window.ceiling(self._choice(vae.spec, window))
            shown.setdefault(f"{self.judge.label} itself, {ceiling_BCTHW.shape[2]} frames", ceiling_BCTHW)
            shown[f"{self.judge.label} decodes {label}"] = read_BCTHW
            figures[label] = {
                "image_decoder": {m: self._image_decoder(window, vae.spec, read_BCTHW, m) for m in COMPARED},
                "video_decoder": {},
                "latents": self._latents(window, vae.spec, latent_BCTHW, f"{key}/{label}"),
            }
            for mapping in COMPARED:
                values, decoded_BCTHW = self._video_decoder(window, vae, mapping)
                figures[label]["video_decoder"][mapping] = values
                if mapping == DEFAULT_MAPPING:
                    shown[f"{label} decodes {self.judge.label}"] = decoded_BCTHW
        return figures, shown

    @staticmethod
    def _choice(spec: VAESpec, window: _Window, mapping: FrameMapping = DEFAULT_MAPPING) -> FrameChoice:
        return choose_frames(spec, window.source_BCTHW.shape[2], mapping)

    def _image_decoder(
        self, window: _Window, spec: VAESpec, read_BCTHW: Tensor, mapping: FrameMapping
    ) -> dict[str, float]:
        choice = self._choice(spec, window, mapping)
        target_BCTHW = map_frames(window.source_BCTHW, choice)
        found = self._frames(read_BCTHW[:, :, : len(choice)], target_BCTHW)
        ceiling = self._frames(window.ceiling(choice), target_BCTHW)
        means = {metric: _mean(values) for metric, values in found.items()}
        means |= {f"ceiling_{metric}": _mean(values) for metric, values in ceiling.items()}
        return means | {"below_ceiling": means["ceiling_psnr"] - means["psnr"]}

    def _video_decoder(
        self, window: _Window, vae: VideoVAE, mapping: FrameMapping
    ) -> tuple[dict[str, float], Tensor]:
        choice = self._choice(vae.spec, window, mapping)
        latent_BCTHW = window.image_latents(choice).to(vae.dtype)
        decoded_BCTHW = to_unit_range(vae.decode(latent_BCTHW), vae.spec.pixel_range)
        source_BCTHW = window.source_BCTHW[:, :, : decoded_BCTHW.shape[2]]
        found = self._frames(decoded_BCTHW, source_BCTHW)
        ceiling = self._frames(window.every_frame[:, :, : decoded_BCTHW.shape[2]], source_BCTHW)
        means = {metric: _mean(values) for metric, values in found.items()}
        means |= {f"ceiling_{metric}": _mean(values) for metric, values in ceiling.items()}
        means["below_ceiling"] = means["ceiling_psnr"] - means["psnr"]
        seen = {frame for frames in choice for frame in frames}
        between = [psnr for number, psnr in enumerate(found["psnr"]) if number not in seen]
        return means | ({"between_psnr": _mean(between)} if between else {}), decoded_BCTHW

    def _latents(self, window: _Window, spec: VAESpec, latent_BCTHW: Tensor, seed_text: str) -> dict[str, Any]:
        wanted_BCTHW = window.image_latents(self._choice(spec, window))
        shift, scale = self.judge.shift_factor, self.judge.scaling_factor
        pair = [(latent - shift) * scale for latent in (latent_BCTHW, wanted_BCTHW)]
        comparison = LatentComparison.empty(spec.latent_channels)
        comparison.add(pair[0], pair[1])
        found_ND, wanted_ND = (latent_features(latent).cpu() for latent in pair)
        seed = zlib.crc32(seed_text.encode("utf-8", "surrogatepass")) ^ self._seed
        order = torch.randperm(len(found_ND), generator=torch.Generator().manual_seed(seed))[:PAIRS_OF_A_WINDOW]
        pairs = {"found": found_ND[order].tolist(), "reference": wanted_ND[order].tolist()}
        return {"comparison": comparison.to_json(), "pairs": pairs}

    def _frames(self, decoded_BCTHW: Tensor, target_BCTHW: Tensor) -> Frames:
        if not torch.isfinite(decoded_BCTHW).all():
            raise NonFinite(f"NaN or infinity where {self.judge.label} and another VAE decode each other's latents")
        frames = {"psnr": psnr_of_frames(decoded_BCTHW, target_BCTHW)[0].tolist()}
        if self._with_ssim:
            frames["ssim"] = ssim_of_frames(decoded_BCTHW, target_BCTHW)[0].tolist()
        return frames


class _Window:
    """What the image VAE makes of a window: computed once, whatever the number of VAEs and mappings."""

    def __init__(self, vae: ImageVAE, source_BCTHW: Tensor) -> None:
        self.source_BCTHW = source_BCTHW
        self._vae = vae
        self._ceilings: dict[FrameChoice, Tensor] = {}

    def decoded(self, latent_BCTHW: Tensor) -> Tensor:
        """D_i of each latent frame, [0, 1]. A frame at a time: memory does not grow with the window."""
        frames = [decode_images(self._vae, latent_BC1HW) for latent_BC1HW in latent_BCTHW.split(1, dim=2)]
        return to_unit_range(torch.cat(frames, dim=2), (-1.0, 1.0))

    def _encoded(self, video_BCTHW: Tensor) -> Tensor:
        """E_i of each frame of [0, 1], raw, likewise."""
        frames = [encode_images(self._vae, frame_BC1HW * 2 - 1).mode() for frame_BC1HW in video_BCTHW.split(1, dim=2)]
        return torch.cat(frames, dim=2)

    @cached_property
    def _every_latent(self) -> Tensor:
        """E_i(X), raw (1, C, T, h, w)."""
        return self._encoded(self.source_BCTHW)

    @cached_property
    def every_frame(self) -> Tensor:
        """D_i(E_i(X)): (1, 3, T, H, W), [0, 1]."""
        return self.decoded(self._every_latent)

    def image_latents(self, choice: FrameChoice) -> Tensor:
        """E_i(psi(X)), raw."""
        if _is_of_frames(choice):
            return self._every_latent[:, :, [frames[0] for frames in choice]]
        return self._encoded(map_frames(self.source_BCTHW, choice))

    def ceiling(self, choice: FrameChoice) -> Tensor:
        """D_i(E_i(psi(X))), [0, 1]."""
        if _is_of_frames(choice):
            return self.every_frame[:, :, [frames[0] for frames in choice]]
        if choice not in self._ceilings:
            self._ceilings[choice] = self.decoded(self.image_latents(choice))
        return self._ceilings[choice]


def _is_of_frames(choice: FrameChoice) -> bool:
    return all(len(frames) == 1 for frames in choice)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
