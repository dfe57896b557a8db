"""The encoder of Open-Sora 1.2's VAE the plain way, frozen: a yardstick of the benchmarks.

Both stages as their authors run them (report 03, branch opensora/v1.2), one micro clip at a time, with the mean of
the first posterior in the place of a sample: contiguous activations, 2-D blocks on folded frames, padded copies
before every 3-D convolution. Do not make it faster: ratios are against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvvae.open_sora_vae import OpenSoraSpec
from jobs.plain_layers import PlainWeights, attend, fold, swish, unfold

_SPATIAL_SCALE = 0.18215
_HALVES_TIME = (False, True, True)


class PlainOpenSoraVAE:
    """Tensors by key, as `VideoVAE.state_dict` gives them."""

    def __init__(self, spec: OpenSoraSpec, weights: Mapping[str, Tensor]) -> None:
        self._num_levels = len(spec.widths)
        self._num_temporal_levels = len(spec.temporal_widths)
        self._latent_channels = spec.latent_channels
        self._weights = PlainWeights(weights)

    @torch.inference_mode()
    def encode_tile(self, video_BCTHW: Tensor) -> Tensor:
        """Raw moments (B, 2C, t, h, w) of one micro clip in [-1, 1]; logvar not clamped."""
        frames = self._encode_frames(fold(video_BCTHW))[:, : self._latent_channels] * _SPATIAL_SCALE
        x = unfold(frames, video_BCTHW.shape[0])
        x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % 4, 0))
        name = "temporal_vae.encoder"
        x = self._causal_conv(x, f"{name}.conv_in")
        for level in range(self._num_temporal_levels):
            for block in range(4):
                x = self._res_block(x, f"{name}.block_res_blocks.{level}.{block}")
            if level < len(_HALVES_TIME) and _HALVES_TIME[level]:
                x = self._causal_conv(x, f"{name}.conv_blocks.{level}", time_stride=2)
        for block in range(4):
            x = self._res_block(x, f"{name}.res_blocks.{block}")
        x = swish(self._weights.group_norm(x, f"{name}.norm1", groups=32, eps=1e-5))
        return self._causal_conv(self._causal_conv(x, f"{name}.conv2"), "temporal_vae.quant_conv")

    # --- the temporal stage --------------------------------------------------------------------------------------

    def _causal_conv(self, x: Tensor, name: str, *, time_stride: int = 1) -> Tensor:
        weight, bias = self._weights.of(f"{name}.conv")
        depth, side = weight.shape[2], weight.shape[3] // 2
        padded = F.pad(x, (side, side, side, side, depth - time_stride, 0))
        return F.conv3d(padded, weight, bias, stride=(time_stride, 1, 1))

    def _res_block(self, x: Tensor, name: str) -> Tensor:
        h = swish(self._weights.group_norm(x, f"{name}.norm1", groups=32, eps=1e-5))
        h = self._causal_conv(h, f"{name}.conv1")
        h = swish(self._weights.group_norm(h, f"{name}.norm2", groups=32, eps=1e-5))
        h = self._causal_conv(h, f"{name}.conv2")
        return h + (x if h.shape[1] == x.shape[1] else self._causal_conv(x, f"{name}.conv3"))

    # --- the image VAE -------------------------------------------------------------------------------------------

    def _encode_frames(self, frames: Tensor) -> Tensor:
        name = "spatial_vae.module.encoder"
        x = self._conv2d(frames, f"{name}.conv_in")
        for level in range(self._num_levels):
            for block in range(2):
                x = self._frame_res_block(x, f"{name}.down_blocks.{level}.resnets.{block}")
            if level < self._num_levels - 1:
                weight, bias = self._weights.of(f"{name}.down_blocks.{level}.downsamplers.0.conv")
                x = F.conv2d(F.pad(x, (0, 1, 0, 1)), weight, bias, stride=2)
        x = self._frame_res_block(x, f"{name}.mid_block.resnets.0")
        x = self._attention(x, f"{name}.mid_block.attentions.0")
        x = self._frame_res_block(x, f"{name}.mid_block.resnets.1")
        x = self._conv2d(swish(self._frame_norm(x, f"{name}.conv_norm_out")), f"{name}.conv_out")
        return self._conv2d(x, "spatial_vae.module.quant_conv")

    def _conv2d(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weights.of(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def _frame_norm(self, x: Tensor, name: str) -> Tensor:
        return self._weights.group_norm(x, name, groups=32, eps=1e-6)

    def _frame_res_block(self, x: Tensor, name: str) -> Tensor:
        h = self._conv2d(swish(self._frame_norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self._conv2d(swish(self._frame_norm(h, f"{name}.norm2")), f"{name}.conv2")
        return h + (x if h.shape[1] == x.shape[1] else self._conv2d(x, f"{name}.conv_shortcut"))

    def _attention(self, x: Tensor, name: str) -> Tensor:
        tokens = self._frame_norm(x, f"{name}.group_norm").flatten(2).transpose(1, 2)
        parts = (F.linear(tokens, *self._weights.of(f"{name}.{part}")) for part in ("to_q", "to_k", "to_v"))
        tokens = F.linear(attend(*parts), *self._weights.of(f"{name}.to_out.0"))
        return x + tokens.transpose(1, 2).unflatten(2, x.shape[-2:])
