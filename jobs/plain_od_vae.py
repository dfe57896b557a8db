"""OD-VAE's encoder the plain way, frozen: a yardstick of the benchmarks, and a second opinion on the numbers.

The network of arXiv 2409.01199 as release 1.2 of its authors runs it, one tile at a time: contiguous activations,
frames in front of every 3-D convolution by padded copies, 2-D blocks on folded copies. Do not make it faster: ratios
are against it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvvae.od_vae import ODVAESpec
from jobs.plain_layers import PlainWeights, attend, fold, swish, unfold

_FRAME_LEVELS = (0, 1)
_HALVES_TIME = (False, True, True)


class PlainODVAE:
    """Tensors by key, as `VideoVAE.state_dict` gives them."""

    def __init__(self, spec: ODVAESpec, weights: Mapping[str, Tensor]) -> None:
        self._num_res_blocks = spec.num_res_blocks
        self._num_levels = len(spec.widths)
        self._weights = PlainWeights(weights)

    @torch.inference_mode()
    def encode_tile(self, video_BCTHW: Tensor) -> Tensor:
        """Raw moments (B, 2C, t, h, w) of one tile in [-1, 1]; logvar not clamped."""
        x = self._by_frame(video_BCTHW, "encoder.conv_in", padding=1)
        for level in range(self._num_levels):
            for block in range(self._num_res_blocks):
                x = self._res_block(x, f"encoder.down.{level}.block.{block}", by_frame=level in _FRAME_LEVELS)
            if level < self._num_levels - 1:
                x = self._downsample(x, f"encoder.down.{level}.downsample.conv", halves_time=_HALVES_TIME[level])
        x = self._res_block(x, "encoder.mid.block_1", by_frame=False)
        x = self._attention(x, "encoder.mid.attn_1")
        x = self._res_block(x, "encoder.mid.block_2", by_frame=False)
        x = self._causal_conv(swish(self._norm(x, "encoder.norm_out")), "encoder.conv_out")
        return self._causal_conv(x, "quant_conv", frames_before=0, padding=0)

    def _by_frame(self, x: Tensor, name: str, *, padding: int = 0, stride: int = 1) -> Tensor:
        return unfold(F.conv2d(fold(x), *self._weights.of(name), padding=padding, stride=stride), x.shape[0])

    def _causal_conv(self, x: Tensor, name: str, *, frames_before: int = 2, padding: int = 1) -> Tensor:
        padded = torch.cat([x[:, :, :1].repeat(1, 1, frames_before, 1, 1), x], dim=2)
        return F.conv3d(padded, *self._weights.of(f"{name}.conv"), padding=(0, padding, padding))

    def _downsample(self, x: Tensor, name: str, *, halves_time: bool) -> Tensor:
        x = F.pad(x, (0, 1, 0, 1, 0, 0))
        if not halves_time:
            return self._by_frame(x, name, stride=2)
        padded = torch.cat([x[:, :, :1].repeat(1, 1, 2, 1, 1), x], dim=2)
        return F.conv3d(padded, *self._weights.of(f"{name}.conv"), stride=2)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return self._weights.group_norm(x, name, groups=32, eps=1e-6)

    def _res_block(self, x: Tensor, name: str, *, by_frame: bool) -> Tensor:
        if by_frame:
            return unfold(self._frame_res_block(fold(x), name), x.shape[0])
        h = self._causal_conv(swish(self._norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = self._causal_conv(swish(self._norm(h, f"{name}.norm2")), f"{name}.conv2")
        if h.shape[1] != x.shape[1]:
            x = self._causal_conv(x, f"{name}.nin_shortcut", frames_before=0, padding=0)
        return x + h

    def _frame_res_block(self, frames: Tensor, name: str) -> Tensor:
        h = F.conv2d(swish(self._norm(frames, f"{name}.norm1")), *self._weights.of(f"{name}.conv1"), padding=1)
        h = F.conv2d(swish(self._norm(h, f"{name}.norm2")), *self._weights.of(f"{name}.conv2"), padding=1)
        if h.shape[1] != frames.shape[1]:
            frames = F.conv2d(frames, *self._weights.of(f"{name}.nin_shortcut"))
        return frames + h

    def _attention(self, x: Tensor, name: str) -> Tensor:
        """One head over the positions of each frame; the norm sees the whole clip."""
        h = self._norm(x, f"{name}.norm")
        q, k, v = (self._causal_conv(h, f"{name}.{part}", frames_before=0, padding=0) for part in "qkv")
        tokens = attend(*(fold(part).flatten(2).transpose(1, 2).contiguous() for part in (q, k, v)))
        h = unfold(tokens.transpose(1, 2).unflatten(2, x.shape[-2:]), x.shape[0])
        return x + self._causal_conv(h, f"{name}.proj_out", frames_before=0, padding=0)
