"""IV-VAE (arXiv 2411.06449): a causal video VAE with a branch for key frames and one for the motion between them.

Its latents have a key-frame half and a motion half (keyframe-based temporal compression, KTC), its convolutions see
whole groups of four frames (group causal convolution), and one frame per convolution continues a video: a clip of any
length is encoded and decoded in chunks, with the numbers of one pass.

The causal baseline of the paper (section 3.1: Stable Diffusion's blocks, RMS norm, causal 3-D convolutions) and the
steps from it to IV-VAE are specs on the same layers. Nobody published weights of those, and their key names are ours.
Checked against the authors' modules: tests/golden, tests/cvvae/test_iv_vae_golden.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from cvvae.iv_vae_layers import (
    BlockSequence,
    BranchAttention,
    BranchConv,
    BranchNormSilu,
    BranchPointConv,
    CausalConv,
    Downsample,
    FrameConv,
    GroupCausalConv,
    MemberFactory,
    PyramidHead,
    ResBlock,
    Stream,
    UnitFactory,
    Upsample,
    numbered,
)
from cvvae.spec import VAESpec
from cvvae.streaming import apply_in_chunks, in_two_steps, plan_chunks
from cvvae.vae import StreamState, VideoVAE

Blocks = Iterator[nn.Module]


@dataclass(frozen=True, slots=True, kw_only=True)
class IVVAESpec(VAESpec):
    """IV-VAE and its ablations."""

    width: int
    """Channels of a branch at the finest level. Both branches together have twice as many, and so has one alone."""
    branches: Literal["2d+3d", "3d+3d", "one"] = "2d+3d"
    """KTC as published, with 3-D convolutions in the key-frame branch too, or no KTC."""
    time_conv: Literal["group_causal", "causal"] = "group_causal"
    encoder_head: Literal["pac", "conv"] = "pac"
    """The encoder's last layer: a pyramid of dilated convolutions, or one convolution."""
    attention: Literal["deep", "middle"] = "deep"
    """At the coarsest level after every block, or in the middle of each half only, as Stable Diffusion has it."""

    def __post_init__(self) -> None:
        VAESpec.__post_init__(self)
        self._require_positive("width")
        if (self.time_stride, self.space_stride) != (4, 8):
            raise ValueError(
                f"VAESpec {self.name!r}: time_stride, space_stride: expected 4 and 8, "
                f"got {self.time_stride} and {self.space_stride}"
            )
        for field, choices in _CHOICES.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"VAESpec {self.name!r}: {field}: expected one of {choices}, got {getattr(self, field)!r}"
                )
        if (self.family == "ivvae-baseline") != (self.branches == "one"):
            raise ValueError(
                f"VAESpec {self.name!r}: branches: expected 'one' for family 'ivvae-baseline' and two for 'ivvae', "
                f"got {self.branches!r} for {self.family!r}"
            )
        if self.num_branches == 2 and self.latent_channels % 2:
            raise ValueError(
                f"VAESpec {self.name!r}: latent_channels: expected an even number, half of it for each branch, "
                f"got {self.latent_channels}"
            )

    @property
    def num_branches(self) -> int:
        return 1 if self.branches == "one" else 2

    @property
    def prefix_exact(self) -> bool:
        """Causal, but for a spec that asks for tiles: those are computed apart from each other."""
        return self.tile_frames is None and self.tile_size is None

    @property
    def widths(self) -> tuple[int, int, int, int]:
        """Channels of all branches together at each level, finest first."""
        full = 2 * self.width
        return full, 2 * full, 4 * full, 4 * full


PIXELS_PER_CHUNK = {"cpu": 4 * 128 * 128}
PIXELS_PER_CHUNK_ELSEWHERE = 16 * 256 * 256
"""`encode` and `decode` take as many groups of frames at once as stay below this, one group at least, four at most.
Small chunks are good to a CPU's cache, large ones keep a GPU busy. Memory grows with it; the numbers change in their
last bits."""

_CHOICES: dict[str, tuple[str, ...]] = {
    "branches": ("2d+3d", "3d+3d", "one"),
    "time_conv": ("group_causal", "causal"),
    "encoder_head": ("pac", "conv"),
    "attention": ("deep", "middle"),
}

_Z4 = IVVAESpec(
    name="ivvae-z4-dim64",
    family="ivvae",
    latent_channels=4,
    width=64,
    scaling_factor=1.3196,
    shift_factor=0.125,
)
_Z16 = replace(_Z4, name="ivvae-z16-dim96", latent_channels=16, width=96, scaling_factor=0.7619, shift_factor=-0.0483)
# The baseline and what the paper adds to it, one at a time. Their latents were never measured: no scale, no shift.
_BASELINE = replace(
    _Z4,
    name="ivvae-baseline",
    family="ivvae-baseline",
    branches="one",
    time_conv="causal",
    encoder_head="conv",
    attention="middle",
    scaling_factor=1.0,
    shift_factor=0.0,
)
_KTC = replace(_BASELINE, name="ivvae-baseline-ktc", family="ivvae", branches="2d+3d")
_STEPS = (
    _BASELINE,
    replace(_BASELINE, name="ivvae-baseline-group-causal", time_conv="group_causal"),
    _KTC,
    replace(_KTC, name="ivvae-baseline-ktc-3d", branches="3d+3d"),
    replace(_KTC, name="ivvae-baseline-ktc-group-causal", time_conv="group_causal"),
    replace(_KTC, name="ivvae-baseline-ktc-pac-attention", encoder_head="pac", attention="deep"),
)

IVVAE_SPECS: dict[str, IVVAESpec] = {
    spec.name: spec
    for spec in (
        _Z4,
        replace(_Z4, name="ivvae-z8-dim64", latent_channels=8, scaling_factor=1.094, shift_factor=-0.0322),
        replace(_Z4, name="ivvae-z16-dim64", latent_channels=16, scaling_factor=0.9697, shift_factor=-0.1553),
        _Z16,
        replace(_Z4, name="ivvae-z4-tiny", width=8),
        replace(_Z4, name="ivvae-z4-dim4-tiny", width=4),  # of the width of the tiny steps, to be compared with them
        replace(_Z16, name="ivvae-z16-tiny", width=12),
        *_STEPS,
        *(replace(spec, name=f"{spec.name}-tiny", width=4) for spec in _STEPS),
    )
}


class IVVAE(VideoVAE):
    """IV-VAE, its baseline and the steps between; see `VideoVAE` for the interface.

    Latents: the key-frame half first, then the motion half. `encode` and `decode` of a whole video run through chunks
    themselves, so beyond input and output their memory does not grow with its length.
    """

    def __init__(self, spec: IVVAESpec) -> None:
        super().__init__(spec)
        self.num_branches = spec.num_branches
        parts = _Parts(spec)
        self.encoder = parts.encoder()
        self.conv1 = parts.point(2 * spec.latent_channels, 2 * spec.latent_channels)
        self.conv2 = parts.point(spec.latent_channels, spec.latent_channels)
        self.decoder = parts.decoder()

    # --- chunks ------------------------------------------------------------------------------------------------

    @property
    def streams(self) -> bool:
        """A spec may ask for tiles, which are computed apart from each other: their numbers are not a stream's."""
        return self.spec.tile_frames is None and self.spec.tile_size is None

    def encode_chunk(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._require_streaming()
        unit = self.spec.time_stride
        self._check_tensor(chunk_BCTHW, name="chunk_BCTHW", channels=self.spec.in_channels)
        num_frames, height, width = chunk_BCTHW.shape[2:]
        if num_frames % unit != (1 if state is None else 0):
            expected = f"1 + {unit}*k frames in the first chunk" if state is None else f"{unit}*k frames"
            raise ValueError(f"chunk_BCTHW: expected {expected}, got {num_frames}")
        # the sides: a single frame of this size must be valid
        self.spec.latent_shape(1, height, width)
        self._check_state(self.encoder, state)
        return in_two_steps(self._encode_step, chunk_BCTHW, state)

    def decode_chunk(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._require_streaming()
        self._check_tensor(latent_BCTHW, name="latent_BCTHW", channels=self.spec.latent_channels)
        self._check_state(self.decoder, state)
        return in_two_steps(self._decode_step, latent_BCTHW, state)

    def _check_state(self, half: BlockSequence, state: StreamState | None) -> None:
        expected = sum(isinstance(module, BranchConv) and module.frames_kept > 0 for module in half.modules())
        if state is not None and len(state) != expected:
            raise ValueError(
                f"state: expected {expected} tensors, what the same function gave with the chunk before, "
                f"got {len(state)}"
            )

    def _require_streaming(self) -> None:
        if not self.streams:
            raise ValueError(
                f"spec {self.spec.name!r} does not stream: tile_frames={self.spec.tile_frames} and "
                f"tile_size={self.spec.tile_size} ask for tiles that are computed apart from each other"
            )

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        num_frames, unit = tile_BCTHW.shape[2], self.spec.time_stride
        chunks = plan_chunks(num_frames, chunk=unit * self._groups_per_chunk(tile_BCTHW, scale=1))
        return apply_in_chunks(
            self._encode_step, tile_BCTHW, chunks, num_frames_out=self.spec.num_latent_frames(num_frames)
        )

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        num_frames = latent_BCTHW.shape[2]
        chunks = plan_chunks(num_frames, chunk=self._groups_per_chunk(latent_BCTHW, scale=self.spec.space_stride))
        return apply_in_chunks(
            self._decode_step, latent_BCTHW, chunks, num_frames_out=self.spec.num_video_frames(num_frames)
        )

    def _groups_per_chunk(self, x_BCTHW: Tensor, *, scale: int) -> int:
        """How many groups of frames are computed at once: any number is right, this one is quick."""
        batch, _, _, height, width = x_BCTHW.shape
        at_once = PIXELS_PER_CHUNK.get(x_BCTHW.device.type, PIXELS_PER_CHUNK_ELSEWHERE)
        return max(1, min(4, at_once // (self.spec.time_stride * batch * scale**2 * height * width)))

    # --- the network, for the first frame alone (state None) or for whole groups after it -------------------------

    def _encode_step(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        stream = Stream(state)
        x = self.encoder(chunk_BCTHW.contiguous(memory_format=self.memory_format), stream)
        moments = self.conv1(x)
        if self.num_branches == 2:  # each branch answers with its own mean and logvar
            mean_2d, logvar_2d, mean_3d, logvar_3d = moments.chunk(4, dim=1)
            moments = torch.cat([mean_2d, mean_3d, logvar_2d, logvar_3d], dim=1)
        return moments, stream.finish()

    def _decode_step(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        stream = Stream(state)
        x = self.conv2(latent_BCTHW.contiguous(memory_format=self.memory_format))
        pixels = self.decoder(x, stream)
        if self.num_branches == 2:
            pixels = _compose(*pixels.chunk(2, dim=1), group=self.spec.time_stride)
        return pixels, stream.finish()


def _compose(frames_2d: Tensor, frames_3d: Tensor, *, group: int) -> Tensor:
    """The video of both branches: the first frame of each group is a key frame, the others lie between.

    The video's first frame comes alone and is a key frame.
    """
    video_BCTHW = frames_3d.clone()
    video_BCTHW[:, :, ::group] = frames_2d[:, :, ::group]
    return video_BCTHW


@dataclass(frozen=True, slots=True)
class _Names:
    """What a checkpoint calls the branches, in the order of their channels."""

    convs: tuple[str, ...]
    resamples: tuple[str, ...]
    attentions: tuple[str, ...]


_TWO_BRANCHES = _Names(("conv_2d", "conv_3d"), ("resample_2d", "resample_3d"), ("Attention_2d", "Attention_3d"))
_ONE_BRANCH = _Names(("conv",), ("resample",), ("attention",))
_NUM_RES_BLOCKS = 2
"""Per level of the encoder; the decoder has one more."""


class _Parts:
    """The blocks of a spec, in running order under the checkpoint's names.

    `group` is how many frames of a group of four there are at a place: 4, 2 after one halving, 1 after both.
    """

    def __init__(self, spec: IVVAESpec) -> None:
        self.spec = spec
        self.names = _ONE_BRANCH if spec.branches == "one" else _TWO_BRANCHES

    def encoder(self) -> BlockSequence:
        fine, middle, coarse, deepest = self.spec.widths
        blocks = [
            *self._res_blocks(_NUM_RES_BLOCKS, fine, fine, group=4),
            self._downsample(fine, halves_time=False),
            *self._res_blocks(_NUM_RES_BLOCKS, fine, middle, group=4),
            self._downsample(middle, halves_time=True),
            *self._res_blocks(_NUM_RES_BLOCKS, middle, coarse, group=2),
            self._downsample(coarse, halves_time=True),
            *([self._attention(coarse)] if self.spec.attention == "deep" else []),
            *self._deep_blocks(_NUM_RES_BLOCKS, deepest),
        ]
        head = PyramidHead if self.spec.encoder_head == "pac" else self._deep_unit
        return BlockSequence(
            conv1=self._unit(self.spec.in_channels, fine, group=4),
            downsamples=numbered(blocks),
            middle=self._middle(deepest),
            head=self._head(deepest, head(deepest, 2 * self.spec.latent_channels)),
        )

    def decoder(self) -> BlockSequence:
        fine, middle, coarse, deepest = self.spec.widths
        count = _NUM_RES_BLOCKS + 1
        blocks = [
            *self._deep_blocks(count, deepest),
            self._upsample(deepest, doubles_time=True),
            *self._res_blocks(count, deepest // 2, coarse, group=2),
            self._upsample(coarse, doubles_time=True),
            *self._res_blocks(count, coarse // 2, middle, group=4),
            self._upsample(middle, doubles_time=False),
            *self._res_blocks(count, middle // 2, fine, group=4),
        ]
        pixels = self.spec.num_branches * self.spec.in_channels
        return BlockSequence(
            conv1=self._deep_unit(self.spec.latent_channels, deepest),
            middle=self._middle(deepest),
            upsamples=numbered(blocks),
            head=self._head(fine, self._unit(fine, pixels, group=4)),
        )

    # --- convolutions ------------------------------------------------------------------------------------------

    def _unit(self, in_channels: int, out_channels: int, *, group: int) -> BranchConv:
        over_time = self._over_time(group)
        kinds = (FrameConv, over_time) if self.spec.branches == "2d+3d" else (over_time, over_time)
        return BranchConv(in_channels, out_channels, members=dict(zip(self.names.convs, kinds, strict=False)))

    def _deep_unit(self, in_channels: int, out_channels: int) -> BranchConv:
        """Where a group has become one frame, the branches share one convolution, and with KTC it is a 2-D one."""
        kind = self._over_time(1) if self.spec.branches == "one" else FrameConv
        return BranchConv(in_channels, out_channels, members={"conv": kind})

    def _over_time(self, group: int) -> MemberFactory:
        return CausalConv if self.spec.time_conv == "causal" else partial(GroupCausalConv, group=group)

    def point(self, in_channels: int, out_channels: int) -> BranchPointConv:
        kinds = (nn.Conv2d, nn.Conv3d) if self.spec.branches == "2d+3d" else (nn.Conv3d, nn.Conv3d)
        return BranchPointConv(in_channels, out_channels, members=dict(zip(self.names.convs, kinds, strict=False)))

    # --- blocks ------------------------------------------------------------------------------------------------

    def _res_blocks(self, count: int, in_channels: int, out_channels: int, *, group: int) -> Blocks:
        for _ in range(count):
            yield self._res_block(in_channels, out_channels, partial(self._unit, group=group))
            in_channels = out_channels

    def _res_block(self, in_channels: int, out_channels: int, unit: UnitFactory) -> ResBlock:
        return ResBlock(in_channels, out_channels, unit=unit, point=self.point, num_branches=self.spec.num_branches)

    def _deep_blocks(self, count: int, channels: int) -> Blocks:
        for _ in range(count):
            yield self._res_block(channels, channels, self._deep_unit)
            if self.spec.attention == "deep":
                yield self._attention(channels)

    def _middle(self, channels: int) -> BlockSequence:
        first, last = (self._res_block(channels, channels, self._deep_unit) for _ in range(2))
        return numbered([first, self._attention(channels), last])

    def _head(self, channels: int, conv: nn.Module) -> BlockSequence:
        norm = BranchNormSilu(channels, num_branches=self.spec.num_branches)
        return BlockSequence(**{"0": norm, "2": conv})  # 1 is the checkpoint's SiLU

    def _attention(self, channels: int) -> BranchAttention:
        return BranchAttention(channels, names=self.names.attentions)

    def _downsample(self, channels: int, *, halves_time: bool) -> Downsample:
        moving = channels // self.spec.num_branches
        time_conv = nn.Conv3d(moving, moving, (2, 1, 1), stride=(2, 1, 1)) if halves_time else None
        return Downsample(channels, channels, names=self.names.resamples, stride=2, time_conv=time_conv)

    def _upsample(self, channels: int, *, doubles_time: bool) -> Upsample:
        moving = channels // self.spec.num_branches
        time_conv = nn.Conv3d(moving, 2 * moving, 1) if doubles_time else None
        return Upsample(channels, channels // 2, names=self.names.resamples, stride=1, time_conv=time_conv)
