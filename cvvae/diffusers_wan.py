"""Wan 2.1's and 2.2's VAE (AutoencoderKLWan): causal, exact as a stream, a latent mean and std for each channel.

2.1: 4x8x8, z = 16. 2.2: 4x16x16, z = 48, with residual shortcuts and pixels folded 2x2 into channels. Also the VAE of
what is built on them. Norms see one pixel of one frame, and attention one frame, so chunks of any length give what
one pass gives, if each convolution is handed the two frames before. diffusers keeps those on the model, loops over 4
frames at a time and drops what is left over (8 frames are encoded as 5); here they go in and out as a state, and only
1 + 4k frames are valid.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from cvvae.diffusers_vae import Arguments, DiffusersClass, DiffusersSpec, DiffusersVAE, Geometry
from cvvae.streaming import apply_in_chunks, in_two_steps, plan_chunks
from cvvae.vae import StreamState


def _geometry(arguments: Arguments) -> Geometry:
    halvings = arguments["temperal_downsample"]
    return Geometry(arguments["z_dim"], 2 ** sum(halvings), 2 ** len(halvings) * (arguments["patch_size"] or 1))


def _check(arguments: Arguments) -> None:
    halvings, patch = arguments["temperal_downsample"], arguments["patch_size"] or 1
    if len(arguments["dim_mult"]) != len(halvings) + 1:
        raise ValueError(
            f"dim_mult: expected {len(halvings) + 1}, one more than temperal_downsample, got {arguments}"
        )
    for name in ("in_channels", "out_channels"):
        if arguments[name] != 3 * patch**2:
            raise ValueError(f"{name}: expected {3 * patch**2}, RGB in patches of {patch}, got {arguments[name]}")
    _, time_stride, space_stride = _geometry(arguments)
    if time_stride != 4:
        raise ValueError(
            f"temperal_downsample: expected two halvings of time, as the class is written, got {halvings}"
        )
    for name, stride in (("scale_factor_temporal", time_stride), ("scale_factor_spatial", space_stride)):
        if arguments[name] != stride:
            raise ValueError(f"{name}: expected {stride}, which the network has, got {arguments[name]}")


@dataclass(frozen=True, slots=True, kw_only=True)
class WanSpec(DiffusersSpec):
    """A Wan VAE: T = 1 + 4k. Normalised latents are (z - mean) / std, so shift is the mean and scale is 1 / std."""

    chunk_frames: int = 4
    """Frames that `encode` computes at once after the first, a multiple of 4; memory grows with it. The numbers
    do not depend on it but for rounding; diffusers has 4."""

    peer: ClassVar[DiffusersClass] = DiffusersClass(
        name="AutoencoderKLWan",
        arguments={
            "attn_scales": (),
            "base_dim": 96,
            "decoder_base_dim": None,
            "dim_mult": (1, 2, 4, 4),
            "in_channels": 3,
            "is_residual": False,
            "num_res_blocks": 2,
            "out_channels": 3,
            "patch_size": None,
            "scale_factor_spatial": 8,
            "scale_factor_temporal": 4,
            "temperal_downsample": (False, True, True),
            "z_dim": 16,
        },
        ignored=frozenset({"dropout", "clip_output"}),
        fixed={"attn_scales": ()},
        geometry=_geometry,
        check=_check,
        normalised_by=("latents_mean", "latents_std"),
    )

    @property
    def prefix_exact(self) -> bool:
        return True

    def __post_init__(self) -> None:
        DiffusersSpec.__post_init__(self)
        if type(self.chunk_frames) is not int or self.chunk_frames < 1 or self.chunk_frames % self.time_stride:
            raise ValueError(
                f"VAESpec {self.name!r}: chunk_frames: expected a positive multiple of {self.time_stride}, "
                f"got {self.chunk_frames}"
            )


# fmt: off
_MEAN_21 = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)
_STD_21 = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)
_MEAN_22 = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)
_STD_22 = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)
# fmt: on


def _spec(name: str, mean: tuple[float, ...], std: tuple[float, ...], **arguments: Any) -> WanSpec:
    config = WanSpec.peer.complete(arguments)
    return WanSpec(
        name=name,
        family="wan",
        **_geometry(dict(config))._asdict(),
        scaling_factor=tuple(1 / deviation for deviation in std),
        shift_factor=mean,
        config=config,
    )


_RESIDUAL = {
    "is_residual": True,
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 16,
}
_TINY_22 = {**_RESIDUAL, "z_dim": 8, "base_dim": 4, "decoder_base_dim": 8, "num_res_blocks": 1}

WAN_SPECS: dict[str, WanSpec] = {
    spec.name: spec
    for spec in (
        _spec("wan21", _MEAN_21, _STD_21),
        _spec("wan22", _MEAN_22, _STD_22, **_RESIDUAL, z_dim=48, base_dim=160, decoder_base_dim=256),
        _spec("wan21-tiny", _MEAN_21, _STD_21, base_dim=8, num_res_blocks=1),
        _spec("wan22-tiny", _MEAN_22[:8], _STD_22[:8], **_TINY_22),
    )
}


class WanVAE(DiffusersVAE):
    """Wan's VAE; see `VideoVAE`. `encode` and `decode` of a whole video run through chunks themselves, so beyond
    input and output their memory does not grow with its length."""

    spec: WanSpec

    def __init__(self, spec: WanSpec) -> None:
        super().__init__(spec)
        self._encoder_slots = _num_slots(self.encoder)
        self._decoder_slots = _num_slots(self.decoder)

    @property
    def streams(self) -> bool:
        return self.spec.tile_frames is None and self.spec.tile_size is None

    def encode_chunk(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._check_chunk(chunk_BCTHW, state)
        _check_state(state, self._encoder_slots)
        return in_two_steps(self._encode_step, chunk_BCTHW, state)

    def decode_chunk(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        self._require_streaming()
        self._check_tensor(latent_BCTHW, name="latent_BCTHW", channels=self.spec.latent_channels)
        _check_state(state, self._decoder_slots)
        return in_two_steps(self._decode_step, latent_BCTHW, state)

    def _encode_moments(self, tile_BCTHW: Tensor) -> Tensor:
        num_frames = tile_BCTHW.shape[2]
        return apply_in_chunks(
            self._encode_step,
            tile_BCTHW,
            plan_chunks(num_frames, chunk=self.spec.chunk_frames),
            num_frames_out=self.spec.num_latent_frames(num_frames),
        )

    def _decode_pixels(self, latent_BCTHW: Tensor) -> Tensor:
        num_frames = latent_BCTHW.shape[2]
        return apply_in_chunks(
            self._decode_step,
            latent_BCTHW,
            plan_chunks(num_frames, chunk=self.spec.chunk_frames // self.spec.time_stride),
            num_frames_out=self.spec.num_video_frames(num_frames),
        )

    # --- the network, for the first frame alone (state None) or for what follows ------------------------------------

    def _encode_step(self, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        slots = _to_slots(state, self._encoder_slots)
        patches = _fold(chunk_BCTHW, self.spec.arguments["patch_size"])
        moments = self.quant_conv(self.encoder(patches, feat_cache=slots, feat_idx=[0]))
        return moments, _to_state(slots, like=chunk_BCTHW)

    def _decode_step(self, latent_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
        slots = _to_slots(state, self._decoder_slots)
        x = self.post_quant_conv(latent_BCTHW)
        patches = self.decoder(x, feat_cache=slots, feat_idx=[0], first_chunk=state is None)
        return _unfold(patches, self.spec.arguments["patch_size"]), _to_state(slots, like=latent_BCTHW)


# --- what diffusers' layers keep: a list with a place for each causal convolution -----------------------------------

_BEFORE_DOUBLING = "Rep"
"""What a layer that doubles time notes of the first frame: that it was there, and nothing to convolve with."""
_EMPTY, _MARK = 1, 2
"""Dimensions of the empty tensors that stand for None and for the note, since a state is of tensors."""

Slots = list[Any]


def _num_slots(half: nn.Module) -> int:
    return sum(isinstance(module, nn.Conv3d) for module in half.modules())


def _check_state(state: StreamState | None, expected: int) -> None:
    if state is not None and len(state) != expected:
        raise ValueError(
            f"state: expected {expected} tensors, what the same function gave with the chunk before, got {len(state)}"
        )


def _to_slots(state: StreamState | None, number: int) -> Slots:
    if state is None:
        return [None] * number
    meant = {_EMPTY: None, _MARK: _BEFORE_DOUBLING}
    return [kept if kept.numel() else meant[kept.ndim] for kept in state]


def _to_state(slots: Iterable[Any], *, like: Tensor) -> StreamState:
    def tensor(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return like.new_empty((0,) * (_EMPTY if kept is None else _MARK))

    return tuple(tensor(kept) for kept in slots)


# --- pixels folded into channels: 2.2 -------------------------------------------------------------------------------


def _fold(video_BCTHW: Tensor, patch: int | None) -> Tensor:
    """(B, C, T, H, W) -> (B, C*p*p, T, H/p, W/p); of a patch's pixels the columns come first."""
    if not patch or patch == 1:
        return video_BCTHW
    split = video_BCTHW.unflatten(-1, (-1, patch)).unflatten(-3, (-1, patch))  # B C T H/p p W/p p
    return split.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _unfold(patches_BCTHW: Tensor, patch: int | None) -> Tensor:
    """The inverse of `_fold`."""
    if not patch or patch == 1:
        return patches_BCTHW
    split = patches_BCTHW.unflatten(1, (-1, patch, patch))  # B C column row T h w
    return split.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)
