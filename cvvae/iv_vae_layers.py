"""Blocks of IV-VAE and of the ablations of its paper (arXiv 2411.06449, section 3).

Activations are (B, C, T, H, W) in channels-last-3d memory, as in cvvae/layers.py. C counts all branches: with
keyframe-based temporal compression (KTC) the first half belongs to the key frames (2-D branch), the second to the
motion between them (3-D branch). Which branches there are is said by names, the checkpoint's, and never by a flag.

Every block takes (x, stream). The stream hands a convolution the frames it kept from the chunk before and collects
those for the chunk after; it lives as long as one call, so modules hold weights only.
"""

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cvvae.fast_conv import FastConv3d
from cvvae.group_causal_conv import empty_channels_last, group_causal_conv
from cvvae.layers import Recomputable, attention, batch_to_frames, channels_to_frames, frames_to_batch, register
from cvvae.vae import StreamState

NORM_EPS = 1e-12
"""The smallest length that a vector is divided by."""
NORM_BLOCK = 2**20
"""Values that a CPU normalises at once: few enough for its cache, many enough that its threads rarely wait for each
other, which takes very long on a busy machine."""


class Stream:
    """The state in one pass over a chunk: what was kept before it and what is kept after it, in running order.

    Without a state the chunk is the video's first frame alone, which blocks treat by rules of its own.
    """

    def __init__(self, state: StreamState | None) -> None:
        self._before = state
        self._after: list[Tensor] = []

    @property
    def is_first(self) -> bool:
        return self._before is None

    def exchange(self, x_BCTHW: Tensor, num_frames: int) -> Tensor | None:
        """The `num_frames` frames before x at this place of the network, None before the first frame of the video.

        Keeps a copy of the last frames of x: a view would keep the whole activation alive.
        """
        recent, previous = x_BCTHW, None
        if self._before is not None:
            previous = self._before[len(self._after)]
            if previous.shape[:2] != x_BCTHW.shape[:2] or previous.shape[3:] != x_BCTHW.shape[3:]:
                raise ValueError(
                    f"state: expected that of a chunk of the same batch and size, got a tensor of shape "
                    f"{tuple(previous.shape)} where {tuple(x_BCTHW.shape)} follows"
                )
        if recent.shape[2] < num_frames:
            earlier = [previous] if previous is not None else [recent] * num_frames
            recent = torch.cat([*earlier, recent], dim=2)
        kept = recent[:, :, recent.shape[2] - num_frames :]
        self._after.append(kept.clone(memory_format=torch.channels_last_3d))
        return previous

    def recomputed(self, block: nn.Module, x_BCTHW: Tensor) -> Tensor:
        """`block(x, self)`, of which only the inputs are kept for a backward pass, which runs the block again.

        The second run must not touch this stream, so the block gets its part of the state as tensors and answers so.
        """
        start = len(self._after)
        count = sum(isinstance(module, BranchConv) and module.frames_kept > 0 for module in block.modules())
        before = () if self._before is None else self._before[start : start + count]

        def run(x_BCTHW: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            part = Stream(None if self.is_first else state)
            return block(x_BCTHW, part), *part.finish()

        x_BCTHW, *after = checkpoint(run, x_BCTHW, *before, use_reentrant=False, preserve_rng_state=False)
        self._after += after
        return x_BCTHW

    def finish(self) -> StreamState:
        """What the next chunk continues from."""
        return tuple(self._after)


class BlockSequence(nn.Module):
    """Runs blocks in order, each under the name that the checkpoint gives it."""

    def __init__(self, **blocks: nn.Module) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        for block in self.children():
            x_BCTHW = block(x_BCTHW, stream)
        return x_BCTHW


class NumberedBlocks(BlockSequence, Recomputable):
    """Blocks that the checkpoint calls 0, 1, 2, ..."""

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        if not (self.recomputes_blocks and torch.is_grad_enabled()):
            return super().forward(x_BCTHW, stream)
        for block in self.children():
            x_BCTHW = stream.recomputed(block, x_BCTHW)
        return x_BCTHW


def numbered(blocks: Iterable[nn.Module]) -> NumberedBlocks:
    """The blocks in running order."""
    return NumberedBlocks(**{str(number): block for number, block in enumerate(blocks)})


# --- convolutions of kernel 3, which keep the size ---------------------------------------------------------------
# `previous` are the frames before x, `frames_kept` of them; the answer is written to `out` if that is given.


class FrameConv(nn.Conv2d):
    """Every frame by itself: the 2-D branch of KTC."""

    frames_kept = 0

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)

    def kernel_of_first_frame(self) -> Tensor:
        return self.weight

    def convolve(self, x_BCTHW: Tensor, previous: Tensor | None, out: Tensor | None = None) -> Tensor:
        answer = batch_to_frames(self(frames_to_batch(x_BCTHW)), num_clips=x_BCTHW.shape[0])
        return answer if out is None else out.copy_(answer)


class CausalConv(FastConv3d):
    """Reads the two frames before each frame; before the first frame of a video it is repeated.

    The paper does not say how its baseline pads; with weights inflated as [0, 0, W] it makes no difference to images.
    """

    frames_kept = 2

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))

    def kernel_of_first_frame(self) -> Tensor:
        return self.weight.sum(dim=2)

    def convolve(self, x_BCTHW: Tensor, previous: Tensor | None, out: Tensor | None = None) -> Tensor:
        assert previous is not None
        answer = self(torch.cat([previous, x_BCTHW], dim=2))
        return answer if out is None else out.copy_(answer)


class GroupCausalConv(nn.Conv3d):
    """Causal between groups of frames, both ways inside: see cvvae/group_causal_conv.py."""

    frames_kept = 1

    def __init__(self, in_channels: int, out_channels: int, *, group: int) -> None:
        super().__init__(in_channels, out_channels, 3, padding=(0, 1, 1))
        self.group = group

    def kernel_of_first_frame(self) -> Tensor:
        return self.weight[:, :, 0] + self.weight[:, :, 1]

    def convolve(self, x_BCTHW: Tensor, previous: Tensor | None, out: Tensor | None = None) -> Tensor:
        assert previous is not None
        assert self.bias is not None
        return group_causal_conv(x_BCTHW, previous, self.weight, self.bias, group=self.group, out=out)


MemberConv = FrameConv | CausalConv | GroupCausalConv
MemberFactory = Callable[[int, int], MemberConv]


class BranchConv(nn.Module):
    """The KTC unit (section 3.2): each member convolves ALL input channels and gives its branch of the output.

    `members` maps the checkpoint's name of a member to its kind, in the order of the output's channels. They share
    one slot of the stream: they read the same input.
    """

    def __init__(self, in_channels: int, out_channels: int, *, members: Mapping[str, MemberFactory]) -> None:
        super().__init__()
        for name, make in members.items():
            self.add_module(name, make(in_channels, out_channels // len(members)))
        self.frames_kept = max(member.frames_kept for member in self._members())

    def _members(self) -> list[MemberConv]:
        return list(self.children())  # pyright: ignore[reportReturnType]

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        previous = stream.exchange(x_BCTHW, self.frames_kept) if self.frames_kept else None
        if stream.is_first or not self.frames_kept:
            return self._convolve_first_frame(x_BCTHW)
        members = self._members()
        if len(members) == 1 or torch.is_grad_enabled() or torch.compiler.is_compiling():
            outs = [member.convolve(x_BCTHW, previous) for member in members]
            return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
        out_BCTHW = empty_channels_last(x_BCTHW, sum(member.out_channels for member in members))
        for member, part in zip(members, out_BCTHW.chunk(len(members), dim=1), strict=True):
            member.convolve(x_BCTHW, previous, out=part)
        return out_BCTHW

    def _convolve_first_frame(self, x_BCTHW: Tensor) -> Tensor:
        """A frame alone is all one 2-D convolution, whose kernels are the members' folded in time."""
        weight = torch.cat([member.kernel_of_first_frame() for member in self._members()])
        bias = torch.cat([member.get_parameter("bias") for member in self._members()])
        frames = F.conv2d(frames_to_batch(x_BCTHW), weight, bias, padding=1)
        return batch_to_frames(frames, num_clips=x_BCTHW.shape[0])


class BranchPointConv(nn.Module):
    """The KTC unit of kernel 1: nothing to keep, and with channels last one matrix product for all members."""

    def __init__(self, in_channels: int, out_channels: int, *, members: Mapping[str, type[nn.Module]]) -> None:
        super().__init__()
        for name, kind in members.items():
            self.add_module(name, kind(in_channels, out_channels // len(members), 1))

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        weight = torch.cat([member.get_parameter("weight").flatten(1) for member in self.children()])
        bias = torch.cat([member.get_parameter("bias") for member in self.children()])
        return F.linear(x_BCTHW.movedim(1, -1), weight, bias).movedim(-1, 1)


# --- norms -------------------------------------------------------------------------------------------------------


class BranchNormSilu(nn.Module):
    """Each branch's channels at a position are scaled to a mean square of 1, times gamma; then x * sigmoid(x).

    No statistics over space or time: what makes a stream exact.
    """

    def __init__(self, channels: int, *, num_branches: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))
        self.num_branches = num_branches

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        x_BTHWC = x_BCTHW.movedim(1, -1)
        gamma = self.gamma.view(self.num_branches, -1)
        if x_BCTHW.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
            normed = F.silu(rms_norm(x_BTHWC.unflatten(-1, gamma.shape), gamma))
            return normed.flatten(-2).to(x_BCTHW.dtype).movedim(-1, 1)
        # block by block, so that all but the first reading and the last writing happens in the cache
        out_BTHWC = x_BTHWC.new_empty(x_BTHWC.shape)
        positions, outs = x_BTHWC.reshape(-1, *gamma.shape), out_BTHWC.view(-1, *gamma.shape)
        per_block = max(1, NORM_BLOCK // gamma.numel())
        for block, out in zip(positions.split(per_block), outs.split(per_block), strict=True):
            out.copy_(F.silu(rms_norm(block, gamma), inplace=True))
        return out_BTHWC.movedim(-1, 1)


def rms_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(|x|, 1e-12) * sqrt(d) * gamma over the last dimension, of size d: a new tensor in fp32.

    fp32 for every dtype: in fp16 the squares overflow and 1e-12 is zero, which would make 0 / 0.
    """
    x = x.float()
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(NORM_EPS)
    normed = x * (math.sqrt(x.shape[-1]) / length)
    return normed * gamma if torch.is_grad_enabled() else normed.mul_(gamma)


# --- blocks ------------------------------------------------------------------------------------------------------

UnitFactory = Callable[[int, int], BranchConv]
PointFactory = Callable[[int, int], BranchPointConv]


class ResBlock(nn.Module):
    """out = shortcut(x) + conv(silu(norm(conv(silu(norm(x)))))); the shortcut exists where channels change."""

    def __init__(
        self, in_channels: int, out_channels: int, *, unit: UnitFactory, point: PointFactory, num_branches: int
    ) -> None:
        super().__init__()
        self.residual = BlockSequence(
            **{  # 1, 4 and 5 are the checkpoint's SiLU and dropout
                "0": BranchNormSilu(in_channels, num_branches=num_branches),
                "2": unit(in_channels, out_channels),
                "3": BranchNormSilu(out_channels, num_branches=num_branches),
                "6": unit(out_channels, out_channels),
            }
        )
        self.shortcut = point(in_channels, out_channels) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        h = self.residual(x_BCTHW, stream)
        return h.add_(x_BCTHW if self.shortcut is None else self.shortcut(x_BCTHW))  # in place on a fresh tensor


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame of one branch, with its norm and the residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.Module()
        self.norm.register_parameter("gamma", nn.Parameter(torch.ones(channels, 1, 1)))
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        height, width = x_BCTHW.shape[-2:]
        # a 1x1 convolution of a position is a linear layer: (out, in, 1, 1) flattens to (out, in)
        tokens = frames_to_batch(x_BCTHW).flatten(2).transpose(1, 2)
        normed = rms_norm(tokens, self.norm.get_parameter("gamma").flatten()).to(tokens.dtype)
        query, key, value = F.linear(normed, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        out = F.linear(attention(query, key, value), self.proj.weight.flatten(1), self.proj.bias) + tokens
        return batch_to_frames(out.transpose(1, 2).unflatten(2, (height, width)), num_clips=x_BCTHW.shape[0])


class BranchAttention(nn.Module):
    """An attention of its own for each branch."""

    def __init__(self, channels: int, *, names: tuple[str, ...]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, FrameAttention(channels // len(names)))

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        attentions = list(self.children())
        parts = zip(attentions, x_BCTHW.chunk(len(attentions), dim=1), strict=True)
        return torch.cat([attend(part) for attend, part in parts], dim=1)


class Resample(nn.Module):
    """What down- and upsamplers share: a 2-D convolution for each branch, and one over time for the last branch.

    The branches' convolutions run as one with as many groups: their inputs are neighbouring channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, names: tuple[str, ...], stride: int, time_conv: nn.Conv3d | None
    ) -> None:
        super().__init__()
        self.stride = stride
        self.names = names
        for name in names:  # 0 is the checkpoint's padding or interpolation
            register(
                self,
                f"{name}.1",
                nn.Conv2d(in_channels // len(names), out_channels // len(names), 3, stride=stride),
            )
        self.time_conv = time_conv

    def _convolve(self, frames: Tensor, padding: int) -> Tensor:
        convs = [self.get_submodule(f"{name}.1") for name in self.names]
        weight, bias = (torch.cat([conv.get_parameter(part) for conv in convs]) for part in ("weight", "bias"))
        return F.conv2d(frames, weight, bias, stride=self.stride, padding=padding, groups=len(convs))


class Downsample(Resample):
    """Halves the sides; with `time_conv`, of kernel and stride (2, 1, 1), the frames too, but not the first one.

    Channels that `time_conv` does not read, the 2-D branch, keep the first frame of each pair: the key frame.
    """

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        frames = self._convolve(F.pad(frames_to_batch(x_BCTHW), (0, 1, 0, 1)), padding=0)
        x_BCTHW = batch_to_frames(frames, num_clips=x_BCTHW.shape[0])
        if self.time_conv is None or stream.is_first:
            return x_BCTHW
        split = x_BCTHW.shape[1] - self.time_conv.in_channels
        moving = self.time_conv(x_BCTHW[:, split:])
        return torch.cat([x_BCTHW[:, :split, ::2], moving], dim=1)


class Upsample(Resample):
    """Doubles the sides by repeating pixels; with `time_conv` the frames too, before that, but not the first one.

    `time_conv` doubles the channels of what it reads: two groups, one for each of two successive frames. The other
    channels, the 2-D branch, are repeated.
    """

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None and not stream.is_first:
            split = x_BCTHW.shape[1] - self.time_conv.in_channels
            moving = channels_to_frames(self.time_conv(x_BCTHW[:, split:]))
            x_BCTHW = torch.cat([x_BCTHW[:, :split].repeat_interleave(2, dim=2), moving], dim=1)
        frames = F.interpolate(frames_to_batch(x_BCTHW), scale_factor=2.0, mode="nearest")
        return batch_to_frames(self._convolve(frames, padding=1), num_clips=x_BCTHW.shape[0])


class PyramidHead(nn.Module):
    """PAC (section 3.4): convolutions of six widths of view side by side, joined by a 1x1 one; frame by frame.

    Each answer is two halves, and all first halves come before all second ones: the branches stay together.
    """

    DILATIONS = (0, 1, 3, 6, 9, 12)
    """0 is the one of kernel 1."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        for dilation in self.DILATIONS:
            conv = (
                nn.Conv2d(in_channels, out_channels, 3, padding=dilation, dilation=dilation)
                if dilation
                else (nn.Conv2d(in_channels, out_channels, 1))
            )
            register(self, f"PAC_{dilation}.conv", conv)
        register(self, "PAC_conv.conv", nn.Conv2d(len(self.DILATIONS) * out_channels, out_channels, 1))

    def forward(self, x_BCTHW: Tensor, stream: Stream) -> Tensor:
        frames = frames_to_batch(x_BCTHW)
        *views, join = (unit.get_submodule("conv") for unit in self.children())
        first_halves, second_halves = zip(*(view(frames).chunk(2, dim=1) for view in views), strict=True)
        joined = join(torch.cat([*first_halves, *second_halves], dim=1))
        return batch_to_frames(joined, num_clips=x_BCTHW.shape[0])
