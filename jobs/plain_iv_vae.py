"""IV-VAE the plain way, frozen: the yardstick of the benchmarks, and a second opinion on the numbers.

The network of arXiv 2411.06449 as its authors run it: the first frame, then four frames at a time, contiguous
activations, every convolution over time preceded by padded copies, branches joined by copies, x * sigmoid(x) in two
steps, answers concatenated chunk after chunk. None of this project's shortcuts. Do not make it faster: the ratios in
the benchmarks are against it. Weights are looked up by the checkpoint's keys.

Layouts: x (B, C, T, H, W); frames (B*T, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvvae import VAESpec
from cvvae.iv_vae import IVVAESpec
from jobs.plain_layers import fold, swish, unfold

_PYRAMID = (0, 1, 3, 6, 9, 12)


class PlainIVVAE:
    """IV-VAE as published (both branches, group causal, PAC). Tensors by key, as `VideoVAE.state_dict` gives them."""

    def __init__(self, spec: VAESpec, weights: Mapping[str, Tensor]) -> None:
        published = isinstance(spec, IVVAESpec) and (
            (spec.branches, spec.time_conv, spec.encoder_head, spec.attention)
            == ("2d+3d", "group_causal", "pac", "deep")
        )
        if not published:
            raise ValueError(f"expected an IV-VAE as published, got {spec}")
        self.spec = spec
        self._weights = {key: tensor.detach().contiguous() for key, tensor in weights.items()}
        self._kept: dict[str, Tensor] = {}

    @torch.inference_mode()
    def encode_tile(self, video_BCTHW: Tensor) -> Tensor:
        """Raw moments (B, 2C, t, h, w) of a video in [-1, 1]; logvar not clamped."""
        self._kept = {}
        moments = self._encode_chunk(video_BCTHW[:, :, :1])
        for start in range(1, video_BCTHW.shape[2], 4):
            moments = torch.cat([moments, self._encode_chunk(video_BCTHW[:, :, start : start + 4])], dim=2)
        mean_2d, logvar_2d, mean_3d, logvar_3d = self._ktc_point(moments, "conv1").chunk(4, dim=1)
        return torch.cat([mean_2d, mean_3d, logvar_2d, logvar_3d], dim=1)

    @torch.inference_mode()
    def decode_tile(self, latent_BCTHW: Tensor) -> Tensor:
        """Pixels (B, 3, T, H, W) of raw latents."""
        self._kept = {}
        latent = self._ktc_point(latent_BCTHW, "conv2")
        video = self._decode_chunk(latent[:, :, :1], is_first=True)
        for number in range(1, latent.shape[2]):
            chunk = self._decode_chunk(latent[:, :, number : number + 1], is_first=False)
            video = torch.cat([video, chunk], dim=2)
        return video

    def _encode_chunk(self, x: Tensor) -> Tensor:
        name, is_first = "encoder.downsamples.{}", x.shape[2] == 1
        x = self._ktc_conv(x, "encoder.conv1", group=4)
        for number, group in ((0, 4), (1, 4), (2, 0), (3, 4), (4, 4), (5, 0), (6, 2), (7, 2), (8, 0)):
            if group:
                x = self._res_block(x, name.format(number), group=group)
            else:
                x = self._downsample(x, name.format(number), halves_time=number > 2 and not is_first)
        x = self._attention(x, name.format(9))
        for number in (10, 12):
            x = self._attention(self._deep_block(x, name.format(number)), name.format(number + 1))
        x = self._middle(x, "encoder.middle")
        return self._pyramid(swish(self._norm(x, "encoder.head.0")), "encoder.head.2")

    def _decode_chunk(self, x: Tensor, *, is_first: bool) -> Tensor:
        name = "decoder.upsamples.{}"
        x = self._middle(self._frame_conv(x, "decoder.conv1.conv", padding=1), "decoder.middle")
        for number in (0, 2, 4):
            x = self._attention(self._deep_block(x, name.format(number)), name.format(number + 1))
        for sampler, group in ((6, 2), (10, 4), (14, 4)):
            x = self._upsample(x, name.format(sampler), doubles_time=sampler < 14 and not is_first)
            for number in range(sampler + 1, sampler + 4):
                x = self._res_block(x, name.format(number), group=group)
        x = self._ktc_conv(swish(self._norm(x, "decoder.head.0")), "decoder.head.2", group=4)
        key_frames, others = x[:, :3, :1], x[:, 3:, 1:]
        return torch.cat([key_frames, others], dim=2)

    def _parameters(self, name: str) -> tuple[Tensor, Tensor]:
        return self._weights[f"{name}.weight"], self._weights[f"{name}.bias"]

    # --- convolutions --------------------------------------------------------------------------------------------

    def _frame_conv(self, x: Tensor, name: str, *, padding: int = 0, dilation: int = 1) -> Tensor:
        frames = F.conv2d(fold(x), *self._parameters(name), padding=padding, dilation=dilation)
        return unfold(frames, x.shape[0])

    def _ktc_conv(self, x: Tensor, name: str, *, group: int) -> Tensor:
        """Both convolutions read everything; each gives its half."""
        still = self._frame_conv(x, f"{name}.conv_2d", padding=1)
        return torch.cat([still, self._group_causal_conv(x, f"{name}.conv_3d", group)], dim=1)

    def _ktc_point(self, x: Tensor, name: str) -> Tensor:
        moving = F.conv3d(x, *self._parameters(f"{name}.conv_3d"))
        return torch.cat([self._frame_conv(x, f"{name}.conv_2d"), moving], dim=1)

    def _group_causal_conv(self, x: Tensor, name: str, group: int) -> Tensor:
        """[frame before | group | zeros]; the first frame of a video is its own frame before."""
        assert x.shape[2] in (1, group)
        padded = torch.cat([self._kept.get(name, x[:, :, :1]), x], dim=2)
        self._kept[name] = x[:, :, -1:].clone()
        return F.conv3d(F.pad(padded, (1, 1, 1, 1, 0, 1)), *self._parameters(name))

    def _both_frame_convs(self, x: Tensor, name: str, *, stride: int, padding: int) -> Tensor:
        halves = x.chunk(2, dim=1)
        outs = []
        for half, part in zip(halves, ("resample_2d", "resample_3d"), strict=True):
            weight, bias = self._parameters(f"{name}.{part}.1")
            outs.append(unfold(F.conv2d(fold(half), weight, bias, stride=stride, padding=padding), x.shape[0]))
        return torch.cat(outs, dim=1)

    def _downsample(self, x: Tensor, name: str, *, halves_time: bool) -> Tensor:
        x = self._both_frame_convs(F.pad(x, (0, 1, 0, 1)), name, stride=2, padding=0)
        if not halves_time:
            return x
        still, moving = x.chunk(2, dim=1)
        moving = F.conv3d(moving, *self._parameters(f"{name}.time_conv"), stride=(2, 1, 1))
        return torch.cat([still[:, :, ::2], moving], dim=1)

    def _upsample(self, x: Tensor, name: str, *, doubles_time: bool) -> Tensor:
        if doubles_time:
            still, moving = x.chunk(2, dim=1)
            moving = F.conv3d(moving, *self._parameters(f"{name}.time_conv"))
            batch, channels, num_frames, height, width = moving.shape
            moving = moving.reshape(batch, 2, channels // 2, num_frames, height, width)
            moving = torch.stack([moving[:, 0], moving[:, 1]], dim=3)
            moving = moving.reshape(batch, channels // 2, 2 * num_frames, height, width)
            x = torch.cat([still.repeat_interleave(2, dim=2), moving], dim=1)
        frames = F.interpolate(fold(x), scale_factor=2.0, mode="nearest-exact")
        return self._both_frame_convs(unfold(frames, x.shape[0]), name, stride=1, padding=1)

    # --- blocks --------------------------------------------------------------------------------------------------

    def _norm(self, x: Tensor, name: str) -> Tensor:
        halves = [F.normalize(half, dim=1) for half in x.chunk(2, dim=1)]
        return torch.cat(halves, dim=1) * (x.shape[1] // 2) ** 0.5 * self._weights[f"{name}.gamma"]

    def _res_block(self, x: Tensor, name: str, *, group: int) -> Tensor:
        h = self._ktc_conv(swish(self._norm(x, f"{name}.residual.0")), f"{name}.residual.2", group=group)
        h = self._ktc_conv(swish(self._norm(h, f"{name}.residual.3")), f"{name}.residual.6", group=group)
        return h + (x if h.shape[1] == x.shape[1] else self._ktc_point(x, f"{name}.shortcut"))

    def _deep_block(self, x: Tensor, name: str) -> Tensor:
        h = swish(self._norm(x, f"{name}.residual.0"))
        h = self._frame_conv(h, f"{name}.residual.2.conv", padding=1)
        h = swish(self._norm(h, f"{name}.residual.3"))
        return x + self._frame_conv(h, f"{name}.residual.6.conv", padding=1)

    def _middle(self, x: Tensor, name: str) -> Tensor:
        x = self._attention(self._deep_block(x, f"{name}.0"), f"{name}.1")
        return self._deep_block(x, f"{name}.2")

    def _attention(self, x: Tensor, name: str) -> Tensor:
        halves = zip(x.chunk(2, dim=1), ("Attention_2d", "Attention_3d"), strict=True)
        return torch.cat([self._branch_attention(half, f"{name}.{part}") for half, part in halves], dim=1)

    def _branch_attention(self, x: Tensor, name: str) -> Tensor:
        """One head over the positions of each frame."""
        frames = fold(x)
        count, channels, height, width = frames.shape
        h = F.normalize(frames, dim=1) * channels**0.5 * self._weights[f"{name}.norm.gamma"]
        qkv = F.conv2d(h, *self._parameters(f"{name}.to_qkv"))
        query, key, value = qkv.reshape(count, 1, 3 * channels, -1).permute(0, 1, 3, 2).contiguous().chunk(3, dim=-1)
        h = F.scaled_dot_product_attention(query, key, value)
        h = h.squeeze(1).permute(0, 2, 1).reshape(count, channels, height, width)
        return unfold(F.conv2d(h, *self._parameters(f"{name}.proj")) + frames, x.shape[0])

    def _pyramid(self, x: Tensor, name: str) -> Tensor:
        outs = [
            self._frame_conv(x, f"{name}.PAC_{dilation}.conv", padding=dilation, dilation=max(1, dilation))
            for dilation in _PYRAMID
        ]
        halves = [out.chunk(2, dim=1) for out in outs]
        joined = torch.cat([half[0] for half in halves] + [half[1] for half in halves], dim=1)
        return self._frame_conv(joined, f"{name}.PAC_conv.conv")
