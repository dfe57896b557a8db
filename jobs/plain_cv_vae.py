"""CV-VAE the plain way, frozen: the yardstick of the benchmarks, and a second opinion on the numbers.

The network of arXiv 2405.20279 as its authors run it, one tile at a time, and none of this project's shortcuts:
contiguous activations, every 3-D convolution preceded by padded copies made in fp32, frames folded into the batch by
copies, x * sigmoid(x) in two steps, and an encoder that keeps every intermediate until it ends. Do not make it
faster: the ratios in docs/benchmarks.md are against it. Weights are looked up by the checkpoint's keys.

Layouts: x (B, C, T, H, W); frames (B*T, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvvae import VAESpec
from cvvae.cv_vae import CVVAESpec
from jobs.plain_layers import attend, fold, swish, unfold

_LDM_NAMES = {
    "down": "encoder.down.{}.block.{}",
    "downsample": "encoder.down.{}.downsample.conv",
    "up": "decoder.up.{}.block.{}",
    "upsample": "decoder.up.{}.upsample.conv",
    "shortcut": "nin_shortcut",
    "mid": "mid.block_1 mid.attn_1 mid.block_2",
    "norm_out": "norm_out",
    "attention": "norm q k v proj_out",
}
_DIFFUSERS_NAMES = {
    "down": "encoder.down_blocks.{}.resnets.{}",
    "downsample": "encoder.down_blocks.{}.downsamplers.0.conv",
    "up": "decoder.up_blocks.{}.resnets.{}",
    "upsample": "decoder.up_blocks.{}.upsamplers.0.conv",
    "shortcut": "conv_shortcut",
    "mid": "mid_block.resnets.0 mid_block.attentions.0 mid_block.resnets.1",
    "norm_out": "conv_norm_out",
    "attention": "group_norm to_q to_k to_v to_out.0",
}
_HALVES_TIME = (True, False, True)
"""The encoder's downsamplers, finest first; the decoder's upsamplers mirror them."""


class PlainCVVAE:
    """Either layout of CV-VAE with strides 4 and 8. Tensors by key, as `VideoVAE.state_dict` gives them."""

    def __init__(self, spec: VAESpec, weights: Mapping[str, Tensor]) -> None:
        if not isinstance(spec, CVVAESpec) or (spec.time_stride, spec.space_stride) != (4, 8):
            raise ValueError(f"expected a CV-VAE with strides 4 and 8, got {spec}")
        self.spec = spec
        self._weights = {key: tensor.detach().contiguous() for key, tensor in weights.items()}
        self._is_sd3 = spec.family == "cvvae-sd3"
        self._names = _DIFFUSERS_NAMES if self._is_sd3 else _LDM_NAMES
        self._space = "replicate" if self._is_sd3 else "constant"
        self._eps = 1e-6 if self._is_sd3 else 1e-5

    @torch.inference_mode()
    def encode_tile(self, video_BCTHW: Tensor) -> Tensor:
        """Raw moments (B, 2C, t, h, w) of one tile in [-1, 1]; logvar not clamped."""
        x = self._causal_conv(video_BCTHW, "encoder.conv_in")
        hs = [x]
        for level in range(len(self.spec.widths)):
            for block in range(self.spec.num_res_blocks):
                hs.append(self._res_block(hs[-1], self._names["down"].format(level, block), causal=True))
            if level < len(_HALVES_TIME):
                name, stride = self._names["downsample"].format(level), (2 if _HALVES_TIME[level] else 1, 2, 2)
                hs.append(self._causal_conv(hs[-1], name, stride=stride, lower_right=True))
        hs.append(self._mid(hs[-1], "encoder", causal=True))
        x = swish(self._group_norm(hs[-1], f"encoder.{self._names['norm_out']}"))
        return self._causal_conv(x, "encoder.conv_out")

    @torch.inference_mode()
    def decode_tile(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of one tile of raw latents."""
        x = self._mid(self._centred_conv(latent_BCTHW, "decoder.conv_in"), "decoder", causal=False)
        for level in reversed(range(len(self.spec.widths))):
            number = len(self.spec.widths) - 1 - level if self._is_sd3 else level
            for block in range(self.spec.num_res_blocks + 1):
                x = self._res_block(x, self._names["up"].format(number, block), causal=False)
            if level > 0:
                x = self._upsample(x, number)
        x = swish(self._group_norm(x, f"decoder.{self._names['norm_out']}"))
        return self._centred_conv(x, "decoder.conv_out")

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]

    # --- convolutions --------------------------------------------------------------------------------------------

    def _causal_conv(
        self, x: Tensor, name: str, *, stride: tuple[int, int, int] = (1, 1, 1), lower_right: bool = False
    ) -> Tensor:
        """The first frame is repeated twice in front. z = 4 downsamples with zeros to the right and below only."""
        sides = (0, 1, 0, 1) if lower_right and not self._is_sd3 else (1, 1, 1, 1)
        padded = F.pad(x.float(), (*sides, 0, 0), mode=self._space)
        padded = F.pad(padded, (0, 0, 0, 0, 2, 0), mode="replicate").to(x.dtype)
        return F.conv3d(padded, *self._parameters(name), stride=stride)

    def _centred_conv(self, x: Tensor, name: str) -> Tensor:
        if self._is_sd3:
            x = F.pad(x.float(), (1, 1, 1, 1, 1, 1), mode="replicate").to(x.dtype)
            return F.conv3d(x, *self._parameters(name))
        return F.conv3d(x, *self._parameters(name), padding=1)

    def _upsample(self, x: Tensor, number: int) -> Tensor:
        """Twice the sides; twice the frames, less the first, where the convolution doubles the channels."""
        x = F.interpolate(x.float(), scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        x = F.pad(x, (1, 1, 1, 1, 0, 0), mode=self._space)
        x = F.pad(x, (0, 0, 0, 0, 1, 1), mode="replicate").to(self._weights["decoder.conv_in.weight"].dtype)
        weight, bias = self._parameters(self._names["upsample"].format(number))
        x = F.conv3d(x, weight, bias)
        if weight.shape[0] == weight.shape[1]:
            return x
        batch, channels, num_frames, height, width = x.shape
        x = x.view(batch, 2, channels // 2, num_frames, height, width).permute(0, 2, 3, 1, 4, 5)
        return x.reshape(batch, channels // 2, 2 * num_frames, height, width)[:, :, 1:].contiguous()

    # --- blocks --------------------------------------------------------------------------------------------------

    def _group_norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, self.spec.norm_groups, *self._parameters(name), eps=self._eps)

    def _res_block(self, x: Tensor, name: str, *, causal: bool) -> Tensor:
        conv = self._causal_conv if causal else self._centred_conv
        h = conv(swish(self._group_norm(x, f"{name}.norm1")), f"{name}.conv1")
        h = swish(self._group_norm(h, f"{name}.norm2"))
        if self.spec.half_3d:
            h = unfold(F.conv2d(fold(h), *self._parameters(f"{name}.conv2"), padding=1), h.shape[0])
        else:
            h = conv(h, f"{name}.conv2")
        if h.shape[1] != x.shape[1] and self._is_sd3:
            x = unfold(F.conv2d(fold(x), *self._parameters(f"{name}.conv_shortcut")), x.shape[0])
        elif h.shape[1] != x.shape[1]:
            x = F.conv3d(x, *self._parameters(f"{name}.nin_shortcut"))
        return x + h

    def _mid(self, x: Tensor, half: str, *, causal: bool) -> Tensor:
        first, attention, second = (f"{half}.{name}" for name in self._names["mid"].split())
        x = self._res_block(x, first, causal=causal)
        h = self._spatial_attention(x, attention)
        if not causal and not self._is_sd3:
            h = self._temporal_attention(h, attention)
        return self._res_block(x + h, second, causal=causal)

    def _spatial_attention(self, x: Tensor, name: str) -> Tensor:
        """One head over the positions of each frame, without the residual."""
        norm, query, key, value, out = (f"{name}.{part}" for part in self._names["attention"].split())
        frames = self._group_norm(fold(x), norm)
        height, width = frames.shape[-2:]
        tokens = frames.flatten(2).transpose(1, 2)
        q, k, v = (self._linear(tokens, part) for part in (query, key, value))
        tokens = self._linear(attend(q, k, v), out)
        return unfold(tokens.transpose(1, 2).unflatten(2, (height, width)), x.shape[0])

    def _temporal_attention(self, x: Tensor, name: str) -> Tensor:
        batch, channels, num_frames, height, width = x.shape
        tokens = x.permute(0, 3, 4, 2, 1).reshape(-1, num_frames, channels)
        tokens = F.layer_norm(tokens, (channels,), *self._parameters(f"{name}.norm_t"), eps=1e-5)
        q, k, v = (self._linear(tokens, f"{name}.{part}") for part in ("q_t", "k_t", "v_t"))
        tokens = self._linear(attend(q, k, v), f"{name}.proj_out_t")
        return tokens.view(batch, height, width, num_frames, channels).permute(0, 4, 3, 1, 2).contiguous()

    def _linear(self, tokens: Tensor, name: str) -> Tensor:
        weight, bias = self._parameters(name)
        return F.linear(tokens, weight.flatten(1), bias)
