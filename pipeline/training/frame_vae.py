"""The image VAE behind the interface of the video VAEs: every frame is a latent frame of its own."""

from __future__ import annotations

from torch import Tensor

from cvvae import VAESpec, VideoVAE
from cvvae.image_vae import ImageVAE
from cvvae.layers import batch_to_frames, frames_to_batch


class FrameVAE(VideoVAE):
    """An image VAE for clips (B, 3, T, H, W) of any T."""

    def __init__(self, image_vae: ImageVAE, *, scaling_factor: float, shift_factor: float) -> None:
        super().__init__(
            VAESpec(
                name="image-vae",
                family="image-vae",
                in_channels=image_vae.in_channels,
                latent_channels=image_vae.latent_channels,
                time_stride=1,
                space_stride=2 ** (len(image_vae.widths) - 1),
                scaling_factor=scaling_factor,
                shift_factor=shift_factor,
            )
        )
        self.image_vae = image_vae

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        return batch_to_frames(self.image_vae.encode(frames_to_batch(tile_BCTHW)), num_clips=tile_BCTHW.shape[0])

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        return batch_to_frames(self.image_vae.decode(frames_to_batch(latent_BCTHW)), num_clips=latent_BCTHW.shape[0])
