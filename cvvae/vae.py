"""`VideoVAE`: the one interface every model stands behind.

A model implements two functions of one tile, `_encode_moments` and `_decode_pixels`; checks, temporal and spatial
tiling, posterior and latent normalisation are the same for all and live here.

Layout legend: B clips, C channels, T video frames, t latent frames, H W pixels, h w latent positions.
Nothing here turns gradients off: wrap the call in `torch.no_grad()` or `torch.inference_mode()` to save memory.
"""

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from cvvae.posterior import DiagonalGaussian
from cvvae.spec import VAESpec
from cvvae.tiling import Tile, apply_spatial_tiles, apply_time_tiles

StreamState = tuple[Tensor, ...]
"""What a causal model carries from one chunk of a video to the next."""


class VideoVAE(nn.Module):
    """A video VAE: (B, 3, T, H, W) in the spec's pixel range <-> raw latents (B, C, t, h, w).

    `weights_sha256` names the weights the model was made with: the hash of the file they were read from, or of the
    tensors for seeded ones; None for weights nobody has named. Training does not update it: save and load again.
    """

    libraries: tuple[str, ...] = ()
    """Packages beside PyTorch whose version may decide last bits."""

    def __init__(self, spec: VAESpec) -> None:
        super().__init__()
        self.spec = spec
        self.weights_sha256: str | None = None
        self.memory_format = torch.channels_last_3d

    # --- what a model implements -------------------------------------------------------------------------------

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        """Pixels of one tile, at most one tile large in time and space -> raw moments (B, 2C, t, h, w)."""
        raise NotImplementedError

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        """Raw latents of one tile -> pixels (B, 3, T, H, W)."""
        raise NotImplementedError

    # --- whole videos ------------------------------------------------------------------------------------------

    def encode(self, video_BCTHW: Tensor) -> DiagonalGaussian:
        """Posterior of the raw latent, mean and logvar each (B, C, t, h, w). An image is a video with T = 1.

        Long or large videos are tiled as the spec says. ValueError on a wrong rank, dtype, channel count or size.
        """
        self._check_video(video_BCTHW)
        num_frames = video_BCTHW.shape[2]
        moments_BCTHW = apply_time_tiles(
            partial(self._encode_spatially, num_frames=num_frames),
            video_BCTHW,
            self.time_tiles(num_frames),
            num_frames_out=self.spec.num_latent_frames(num_frames),
        )
        return DiagonalGaussian.from_moments(moments_BCTHW)

    def encode_untiled(self, video_BCTHW: Tensor) -> DiagonalGaussian:
        """`encode` in one pass over all frames, without the spec's tiles in time: to see what tiles change. Its
        memory grows with the video. ValueErrors as `encode`."""
        self._check_video(video_BCTHW)
        return DiagonalGaussian.from_moments(self._encode_spatially(video_BCTHW, num_frames=video_BCTHW.shape[2]))

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        """Video (B, 3, T, H, W) of raw latents; values are not clamped to the pixel range.

        Normalised latents go through `denormalize` first. ValueError on a wrong rank, dtype or channel count.
        """
        self._check_tensor(latent_BCTHW, name="latent_BCTHW", channels=self.spec.latent_channels)
        num_latent_frames = latent_BCTHW.shape[2]
        return apply_time_tiles(
            partial(self._decode_spatially, num_latent_frames=num_latent_frames),
            latent_BCTHW,
            self.spec.decode_tiles(num_latent_frames),
            num_frames_out=self.spec.num_video_frames(num_latent_frames),
        )

    def normalize(self, latent: Tensor) -> Tensor:
        """Raw latents -> those a diffusion model is trained on: (z - shift) * scale."""
        shift, scale = self._per_channel(latent)
        return (latent - shift) * scale

    def denormalize(self, latent: Tensor) -> Tensor:
        """The inverse of `normalize`."""
        shift, scale = self._per_channel(latent)
        return latent / scale + shift

    def _per_channel(self, latent: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Shift and scale that broadcast over (..., C, t, h, w)."""
        shift, scale = (
            torch.tensor(value, dtype=latent.dtype, device=latent.device).view(-1, 1, 1, 1)
            if isinstance(value, tuple)
            else value
            for value in (self.spec.shift_factor, self.spec.scaling_factor)
        )
        return shift, scale

    # --- a causal stream: state in, state out, nothing kept on the module ----------------------------------------

    @property
    def prefix_exact(self) -> bool:
        """What its spec claims, `VAESpec.prefix_exact`."""
        return self.spec.prefix_exact

    @property
    def streams(self) -> bool:
        """Whether `encode_chunk` and `decode_chunk` give exactly (to rounding) what `encode` and `decode` give."""
        return False

    def encode_chunk(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Raw moments (B, 2C, t, h, w) of the next frames of a video, and the state for those after them.

        `state` is None for the first chunk, which has 1 + time_stride * k frames; the others have time_stride * k.
        The state's size does not depend on how many frames went before. ValueError if the model does not stream.
        """
        raise ValueError(f"spec {self.spec.name!r} does not stream: its latents depend on frames that come later")

    def decode_chunk(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        """Pixels (B, 3, T, H, W) of the next latent frames, and the state for those after; see `encode_chunk`."""
        raise ValueError(f"spec {self.spec.name!r} does not stream: its pixels depend on latents that come later")

    # --- one temporal tile: what a pipeline batches across clips -------------------------------------------------

    def time_tiles(self, num_frames: int) -> tuple[Tile, ...]:
        """The temporal tiles `encode` cuts a video into; `drop` counts latent frames. ValueError on an invalid T."""
        self.spec.num_latent_frames(num_frames)
        return self.spec.encode_tiles(num_frames)

    def encode_tile(self, tile_BCTHW: Tensor, *, num_frames: int | None = None) -> Tensor:
        """Raw moments (B, 2C, t, h, w), logvar not clamped, of ONE temporal tile per batch entry.

        `num_frames` is the length of the videos that the tiles are of; None: the tiles are whole videos. It decides
        how some families cut in space (`VAESpec.encode_tiling_of`).
        The caller drops the first `Tile.drop` latent frames and joins. ValueError if longer than a tile of the spec.
        """
        self._check_video(tile_BCTHW)
        longest = self.spec.longest_tile
        if longest is not None and tile_BCTHW.shape[2] > longest:
            raise ValueError(
                f"tile_BCTHW: expected at most {longest} frames (one temporal tile of spec "
                f"{self.spec.name!r}), got {tile_BCTHW.shape[2]}; see time_tiles()"
            )
        return self._encode_spatially(tile_BCTHW, num_frames=num_frames or tile_BCTHW.shape[2])

    def _encode_spatially(self, tile_BCTHW: Tensor, *, num_frames: int) -> Tensor:
        tiling = self.spec.encode_tiling_of(num_frames, *tile_BCTHW.shape[-2:])
        if tiling is None:
            return self._encode_moments(tile_BCTHW)
        return apply_spatial_tiles(self._encode_moments, tile_BCTHW, tiling)

    def _decode_spatially(self, latent_BCTHW: Tensor, *, num_latent_frames: int) -> Tensor:
        tiling = self.spec.decode_tiling_of(num_latent_frames, *latent_BCTHW.shape[-2:])
        if tiling is None:
            return self._decode_pixels(latent_BCTHW)
        return apply_spatial_tiles(self._decode_pixels, latent_BCTHW, tiling)

    # --- checks and placement ----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def _check_video(self, video_BCTHW: Tensor) -> None:
        self._check_tensor(video_BCTHW, name="video_BCTHW", channels=self.spec.in_channels)
        _, _, num_frames, height, width = video_BCTHW.shape
        self.spec.latent_shape(num_frames, height, width)

    def _check_tensor(self, x: Tensor, *, name: str, channels: int) -> None:
        if x.ndim != 5 or x.shape[1] != channels or 0 in x.shape:
            raise ValueError(
                f"{name}: expected 5 dimensions (B, C={channels}, T, H, W), none empty, got shape {tuple(x.shape)}"
            )
        if x.dtype != self.dtype:
            raise ValueError(f"{name}: expected the model's dtype {self.dtype}, got {x.dtype}; convert with .to()")

    def use_memory_format(self, memory_format: torch.memory_format) -> Self:
        """Sets the layout of activations and convolution kernels: `torch.channels_last_3d`, in which models are
        built, or `torch.contiguous_format`. The same numbers up to rounding, at another speed.

        `Module.to(memory_format=torch.channels_last_3d)` cannot: it refuses the 4-D kernels of 2-D convolutions.
        """
        self.memory_format = memory_format
        channels_last = memory_format is torch.channels_last_3d
        formats = {4: torch.channels_last if channels_last else memory_format, 5: memory_format}
        for parameter in self.parameters():
            if parameter.ndim in formats:
                parameter.data = parameter.data.contiguous(memory_format=formats[parameter.ndim])
        return self
