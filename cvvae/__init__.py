"""Video VAEs as a library, with nothing but torch, numpy and safetensors beneath."""

from cvvae.families import SPECS, spec_from_dict
from cvvae.posterior import DiagonalGaussian
from cvvae.spec import VAESpec
from cvvae.tiling import Tile
from cvvae.vae import VideoVAE
from cvvae.weights import build_vae, load_vae, save_vae, seeded_vae, weights_sha256

__all__ = [
    "SPECS",
    "DiagonalGaussian",
    "Tile",
    "VAESpec",
    "VideoVAE",
    "build_vae",
    "load_vae",
    "save_vae",
    "seeded_vae",
    "spec_from_dict",
    "weights_sha256",
]
