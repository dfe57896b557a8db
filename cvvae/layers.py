"""Blocks of CV-VAE's two checkpoint layouts (arXiv 2405.20279 section 3.2 and the authors' code).

Activations are (B, C, T, H, W) in channels-last-3d memory: convolutions are twice as fast in it on a CPU, and the
frames of a clip are then a (B*T, C, H, W) channels-last view, so that 2-D layers need no copy. What differs between
the layouts (names, padding, epsilon) arrives as a constructor argument; no block knows which model it is in.

Padding is native: no fp32 detour, zeros come from the convolution itself, only repeated edges are written out.
"""

from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvvae.exact_norm import can_norm_exactly, group_norm_silu
from cvvae.fast_conv import FastConv3d

SpacePadding = Literal["zeros", "replicate"]
ConvFactory = Callable[[int, int], nn.Module]
"""(channels in, channels out) -> a convolution of kernel 3 that keeps the size."""


def register(parent: nn.Module, path: str, child: nn.Module) -> None:
    """Registers `child` under a dotted name, with containers in between: 'to_out.0' makes `to_out` holding '0'."""
    *containers, leaf = path.split(".")
    for name in containers:
        if name not in dict(parent.named_children()):
            parent.add_module(name, nn.Module())
        parent = parent.get_submodule(name)
    parent.add_module(leaf, child)


class Recomputable(nn.Module):
    """A sequence of blocks that knows gradient checkpointing: see `set_recomputation`."""

    recomputes_blocks = False
    """A backward pass keeps the input of each block only and runs the block again, with the same numbers."""


def set_recomputation(model: nn.Module, recomputes_blocks: bool) -> None:
    """Turns gradient checkpointing of blocks on or off in every part of a model that has it."""
    for module in model.modules():
        if isinstance(module, Recomputable):
            module.recomputes_blocks = recomputes_blocks


class NamedSequence(Recomputable):
    """Runs blocks in order, each registered under the dotted name that its checkpoint gives it.

    So a whole encoder is a list of (name, block), and the key table of a checkpoint is readable in one place.
    """

    def __init__(self, blocks: Iterable[tuple[str, nn.Module]]) -> None:
        super().__init__()
        order: list[str] = []
        for path, block in blocks:
            register(self, path, block)
            order.append(path)
        self.order = tuple(order)

    def forward(self, x: Tensor) -> Tensor:
        for path in self.order:
            block = self.get_submodule(path)
            if self.recomputes_blocks and torch.is_grad_enabled():
                # no block draws random numbers
                x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x)
        return x


class EdgeConv3d(FastConv3d):
    """Kernel-3 convolution that repeats edge frames in time (`frames_before`, `frames_after`).

    (2, 0) is CV-VAE's causal convolution: replicated, although the paper says reflected. In space it pads one pixel
    on each side, zeros or replicated.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        frames_before: int,
        frames_after: int,
        space: SpacePadding,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        side = 1 if space == "zeros" else 0
        super().__init__(in_channels, out_channels, 3, stride=stride, padding=(0, side, side))
        self.frames = (frames_before, frames_after)
        self.space = space

    def forward(self, input: Tensor) -> Tensor:
        if self.space == "replicate":
            padded = F.pad(input, (1, 1, 1, 1, *self.frames), mode="replicate")
        else:
            before, after = self.frames
            padded = torch.cat([input[:, :, :1]] * before + [input] + [input[:, :, -1:]] * after, dim=2)
        return super().forward(padded)


class RightBottomConv3d(FastConv3d):
    """Causal kernel-3 convolution with stride 2 in space that pads zeros right and below only, as LDM does."""

    def __init__(self, in_channels: int, out_channels: int, *, stride: tuple[int, int, int]) -> None:
        super().__init__(in_channels, out_channels, 3, stride=stride)

    def forward(self, input: Tensor) -> Tensor:
        # one copy for both: pad everything with zeros, then write the first frame into the frames before it
        padded = F.pad(input, (0, 1, 0, 1, 2, 0))
        padded[:, :, :2] = padded[:, :, 2:3]
        return super().forward(padded)


class FrameConv2d(nn.Conv2d):
    """A 2-D convolution of every frame of (B, C, T, H, W) by itself."""

    def forward(self, input: Tensor) -> Tensor:
        return batch_to_frames(super().forward(frames_to_batch(input)), num_clips=input.shape[0])


class NormSilu(nn.GroupNorm):
    """GroupNorm over (C/groups, T, H, W) jointly, then x * sigmoid(x): so not even the encoder is causal."""

    def forward(self, input: Tensor) -> Tensor:
        if can_norm_exactly(input):
            return group_norm_silu(input, self.num_groups, self.weight, self.bias, self.eps)
        # in place on the norm's fresh output: a new buffer of this size costs more than the arithmetic
        return F.silu(super().forward(input), inplace=True)


class ResBlock(nn.Module):
    """out = shortcut(x) + conv2(silu(norm2(conv1(silu(norm1(x)))))); the shortcut exists where channels change."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        conv1: ConvFactory,
        conv2: ConvFactory,
        shortcut: tuple[str, ConvFactory],
        groups: int,
        eps: float,
    ) -> None:
        super().__init__()
        self.norm1 = NormSilu(groups, in_channels, eps)
        self.conv1 = conv1(in_channels, out_channels)
        self.norm2 = NormSilu(groups, out_channels, eps)
        self.conv2 = conv2(out_channels, out_channels)
        self.shortcut_name, make_shortcut = shortcut
        if in_channels != out_channels:
            self.add_module(self.shortcut_name, make_shortcut(in_channels, out_channels))

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv2(self.norm2(self.conv1(self.norm1(x))))
        if self.conv1.in_channels != self.conv1.out_channels:
            x = self.get_submodule(self.shortcut_name)(x)
        return h.add_(x)  # in place on a fresh tensor, for the same reason as in NormSilu


class Resample(nn.Module):
    """A down- or upsampler that is only its convolution; both layouts call that `conv`."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(Resample):
    """Doubles H and W by repeating pixels; doubles time (T -> 2T - 1) if the convolution doubles the channels.

    The doubled channels are two groups, one for each of two successive frames; the very first frame is dropped, so a
    single frame stays single.
    """

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__(conv)
        self.doubles_time = conv.out_channels == 2 * conv.in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))
        return channels_to_frames(x)[:, :, 1:] if self.doubles_time else x


class AttentionNames(NamedTuple):
    """Key names of a mid-block attention, and whether its projections are stored as 1x1 convolutions."""

    norm: str
    query: str
    key: str
    value: str
    out: str
    as_conv: bool


class SpatialAttention(nn.Module):
    """Single-head attention over the H*W positions of each frame, plus a residual. Norm statistics are per frame."""

    def __init__(self, channels: int, *, names: AttentionNames, groups: int, eps: float) -> None:
        super().__init__()
        self.names = names
        register(self, names.norm, nn.GroupNorm(groups, channels, eps))
        for path in (names.query, names.key, names.value, names.out):
            register(self, path, nn.Conv2d(channels, channels, 1) if names.as_conv else nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """The attention branch without the residual, (B, C, T, H, W) -> same."""
        height, width = x.shape[-2:]
        frames = self.get_submodule(self.names.norm)(frames_to_batch(x))
        tokens = frames.flatten(2).transpose(1, 2)
        tokens = attention(*(self._project(getattr(self.names, part), tokens) for part in ("query", "key", "value")))
        tokens = self._project(self.names.out, tokens)
        return batch_to_frames(tokens.transpose(1, 2).unflatten(2, (height, width)), num_clips=x.shape[0])

    def _project(self, path: str, tokens: Tensor) -> Tensor:
        layer = self.get_submodule(path)
        # a 1x1 convolution of a position is a linear layer: (out, in, 1, 1) flattens to (out, in)
        return F.linear(tokens, layer.get_parameter("weight").flatten(1), layer.get_parameter("bias"))


class SpatioTemporalAttention(SpatialAttention):
    """Spatial attention whose output passes through attention over the frames of the tile, then the residual.

    There is no residual around the temporal part: with T = 1 it still acts, through its value path.
    """

    def __init__(self, channels: int, *, names: AttentionNames, groups: int, eps: float) -> None:
        super().__init__(channels, names=names, groups=groups, eps=eps)
        self.norm_t = nn.LayerNorm(channels, eps)
        self.q_t = nn.Linear(channels, channels)
        self.k_t = nn.Linear(channels, channels)
        self.v_t = nn.Linear(channels, channels)
        self.proj_out_t = nn.Linear(channels, channels)

    def attend(self, x: Tensor) -> Tensor:
        batch, _, num_frames, height, width = x.shape
        h = super().attend(x)
        tokens = self.norm_t(h.permute(0, 3, 4, 2, 1).reshape(batch * height * width, num_frames, -1))
        tokens = self.proj_out_t(attention(self.q_t(tokens), self.k_t(tokens), self.v_t(tokens)))
        return tokens.view(batch, height, width, num_frames, -1).permute(0, 4, 3, 1, 2)


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Single-head softmax attention of (N, tokens, C) with scale 1/sqrt(C)."""
    query, key, value = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    return F.scaled_dot_product_attention(query, key, value).squeeze(1)


def frames_to_batch(x_BCTHW: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W): a view if the memory is channels-last-3d, then itself channels-last."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def batch_to_frames(frames: Tensor, *, num_clips: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), always a view."""
    return frames.unflatten(0, (num_clips, -1)).transpose(1, 2)


_PIXELS_AT_ONCE = 1 << 20


def frame_by_frame(function: Callable[[Tensor], Tensor], x_BCTHW: Tensor, *, pixels: int) -> Tensor:
    """`function` of frames (N, C, H, W) of `pixels` pixels, as many at once as have a megapixel: beyond that only
    memory grows."""
    at_once = max(1, _PIXELS_AT_ONCE // pixels)
    pieces = [function(frames) for frames in frames_to_batch(x_BCTHW).split(at_once)]
    return batch_to_frames(torch.cat(pieces), num_clips=x_BCTHW.shape[0])


def channels_to_frames(x_BCTHW: Tensor) -> Tensor:
    """(B, 2C, T, H, W) -> (B, C, 2T, H, W): channel n*C + c of frame t becomes channel c of frame 2t + n."""
    batch, channels, num_frames, height, width = x_BCTHW.shape
    split = x_BCTHW.movedim(1, -1).unflatten(-1, (2, channels // 2))
    # (B, T, H, W, 2, C) -> (B, T, 2, H, W, C): the copy below leaves the channels last
    joined = split.movedim(4, 2).reshape(batch, 2 * num_frames, height, width, channels // 2)
    return joined.movedim(-1, 1)
