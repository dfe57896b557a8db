"""Video VAEs as a library: CV-VAE in PyTorch, with nothing but torch, numpy and safetensors beneath."""

from cvvae.posterior import DiagonalGaussian
from cvvae.spec import SPECS, VAESpec
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
    "weights_sha256",
]
