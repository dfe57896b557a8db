"""The trained checkpoints that come with this package: small, for laptops, demos and tests."""

from __future__ import annotations

from pathlib import Path

SHIPPED = ("tiny-image-vae", "tiny-cvvae")
"""tiny-image-vae: frames, z = 4, f = 8. tiny-cvvae: the CV-VAE that was inflated from it and shares its latents."""
_FOLDER = Path(__file__).parent / "checkpoints"


def shipped_checkpoint(name: str) -> Path:
    """The folder with its config.json, weights and model card. ValueError if there is none of that name."""
    if name not in SHIPPED:
        raise ValueError(f"expected one of the shipped checkpoints {', '.join(SHIPPED)}, got {name!r}")
    return _FOLDER / name
