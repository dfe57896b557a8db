"""Which plain transcription stands for which family: the yardsticks of bench_encode.py."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from cvvae import VAESpec
from cvvae.cv_vae import CVVAESpec
from cvvae.iv_vae import IVVAESpec
from cvvae.od_vae import ODVAESpec
from cvvae.open_sora_vae import OpenSoraSpec
from jobs.plain_cv_vae import PlainCVVAE
from jobs.plain_iv_vae import PlainIVVAE
from jobs.plain_od_vae import PlainODVAE
from jobs.plain_open_sora_vae import PlainOpenSoraVAE


class PlainVAE(Protocol):
    """A family's encoder as its authors run it."""

    def encode_tile(self, video_BCTHW: Tensor) -> Tensor:
        """Raw moments (B, 2C, t, h, w) of one tile in [-1, 1]; logvar not clamped."""
        ...


@runtime_checkable
class PlainDecoder(Protocol):
    """One whose decoder is transcribed too."""

    def decode_tile(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of one tile of raw latents."""
        ...


def plain_vae(spec: VAESpec, weights: Mapping[str, Tensor]) -> PlainVAE:
    """ValueError where a family has no transcription, or its transcription not this variant."""
    if isinstance(spec, CVVAESpec):
        return PlainCVVAE(spec, weights)
    if isinstance(spec, IVVAESpec):
        return PlainIVVAE(spec, weights)
    if isinstance(spec, ODVAESpec):
        return PlainODVAE(spec, weights)
    if isinstance(spec, OpenSoraSpec):
        return PlainOpenSoraVAE(spec, weights)
    raise ValueError(f"spec {spec.name!r}: family {spec.family!r} has no plain transcription to compare with")
