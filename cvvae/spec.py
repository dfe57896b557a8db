"""`VAESpec`: the frozen facts of a video VAE, and `SPECS`: the named ones.

A spec says everything but the weights that decides the numbers a VAE gives. Shapes of videos and latents follow from
it; no other file holds a stride as a literal.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from cvvae.tiling import SpatialTiling


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESpec:
    """Architecture, strides, latent normalisation and tile plan of one VAE. Contradictions are a ValueError here.

    Videos have T = 1 + time_stride * k frames and sides that are multiples of space_stride, values in `pixel_range`.
    Normalised latents are (z - shift_factor) * scaling_factor.
    """

    name: str
    family: str
    """Which module tree and key names: see `cvvae.weights`."""
    in_channels: int = 3
    latent_channels: int
    widths: tuple[int, ...]
    """Channels of each level, finest first."""
    num_res_blocks: int = 2
    """Residual blocks per encoder level; the decoder has one more."""
    norm_groups: int = 32
    half_3d: bool = True
    """The second convolution of each residual block is 2-D ("2D+3D"), not 3-D."""
    time_stride: int = 4
    space_stride: int = 8
    scaling_factor: float
    shift_factor: float
    tile_frames: int | None = 16
    """Video frames from one temporal tile to the next; a tile holds one more. None: never tile."""
    tile_size: int | None = 576
    """Side of a spatial tile in pixels; larger videos are tiled. None: never tile."""
    tile_overlap: float = 0.2222
    pixel_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        counts = ("in_channels", "latent_channels", "num_res_blocks", "norm_groups", "time_stride", "space_stride")
        for field in counts:
            if getattr(self, field) < 1:
                raise ValueError(f"VAESpec {self.name!r}: {field}: expected >= 1, got {getattr(self, field)}")
        if not self.widths or any(width < 1 or width % self.norm_groups for width in self.widths):
            raise ValueError(
                f"VAESpec {self.name!r}: widths: expected positive multiples of norm_groups={self.norm_groups}, "
                f"got {self.widths}"
            )
        if self.scaling_factor == 0:
            raise ValueError(f"VAESpec {self.name!r}: scaling_factor: expected a number other than 0, got 0")
        if self.tile_frames is not None and (self.tile_frames < 1 or self.tile_frames % self.time_stride):
            raise ValueError(
                f"VAESpec {self.name!r}: tile_frames: expected a positive multiple of "
                f"time_stride={self.time_stride} or None, got {self.tile_frames}"
            )
        if not 0 <= self.tile_overlap <= 0.5:
            # beyond one half a tile would overlap the one before its neighbour
            raise ValueError(f"VAESpec {self.name!r}: tile_overlap: expected 0 to 0.5, got {self.tile_overlap}")
        _ = self.encode_tiling, self.decode_tiling  # raise here what would give wrong shapes later

    @property
    def latent_tile_frames(self) -> int | None:
        """Latent frames from one temporal tile to the next."""
        return None if self.tile_frames is None else self.tile_frames // self.time_stride

    @property
    def encode_tiling(self) -> SpatialTiling | None:
        if self.tile_size is None:
            return None
        return SpatialTiling.for_encoding(self.tile_size, overlap=self.tile_overlap, space_stride=self.space_stride)

    @property
    def decode_tiling(self) -> SpatialTiling | None:
        if self.tile_size is None:
            return None
        return SpatialTiling.for_decoding(self.tile_size, overlap=self.tile_overlap, space_stride=self.space_stride)

    def is_valid_num_frames(self, num_frames: int) -> bool:
        """Whether a video of that many frames can be encoded without dropping any."""
        return num_frames >= 1 and (num_frames - 1) % self.time_stride == 0

    def largest_valid_num_frames(self, num_frames: int) -> int:
        """The longest valid video length that is at most `num_frames`. ValueError below one frame."""
        if num_frames < 1:
            raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
        return num_frames - (num_frames - 1) % self.time_stride

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a valid video length; ValueError names the nearest valid one."""
        if num_frames < 1:
            raise ValueError(f"video frames T: expected at least 1, got {num_frames}")
        if not self.is_valid_num_frames(num_frames):
            nearest = self.largest_valid_num_frames(num_frames)
            raise ValueError(
                f"video frames T: expected 1 + {self.time_stride}*k for spec {self.name!r}, got {num_frames}; "
                f"the nearest shorter is {nearest}, the nearest longer {nearest + self.time_stride}"
            )
        return 1 + (num_frames - 1) // self.time_stride

    def num_video_frames(self, num_latent_frames: int) -> int:
        """Video frames that decoding gives."""
        if num_latent_frames < 1:
            raise ValueError(f"latent frames t: expected at least 1, got {num_latent_frames}")
        return 1 + (num_latent_frames - 1) * self.time_stride

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, t, h, w) of the latent of a (T, H, W) video. ValueError on a T or a side that does not fit."""
        t = self.num_latent_frames(num_frames)
        for side, size in (("height", height), ("width", width)):
            if size < self.space_stride or size % self.space_stride:
                raise ValueError(
                    f"video {side}: expected a positive multiple of {self.space_stride} "
                    f"for spec {self.name!r}, got {size}"
                )
        return self.latent_channels, t, height // self.space_stride, width // self.space_stride

    def to_dict(self) -> dict[str, Any]:
        """Every field in declaration order, ready for JSON: the same spec always gives the same text."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of `to_dict`. ValueError on fields that are unknown or missing."""
        expected = {field.name for field in fields(cls)}
        if set(values) != expected:
            raise ValueError(
                f"VAESpec fields: missing {sorted(expected - set(values))}, unknown {sorted(set(values) - expected)}"
            )
        arguments: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**arguments)


# SD1.5 and SD2.1 share one latent space and its scale.
_SD21 = VAESpec(
    name="cvvae-sd21",
    family="cvvae-sd21",
    latent_channels=4,
    widths=(128, 256, 512, 512),
    scaling_factor=0.18215,
    shift_factor=0.0,
)
# The released SD3 config states no scale and shift; these are SD3's own.
_SD3 = replace(
    _SD21,
    name="cvvae-sd3",
    family="cvvae-sd3",
    latent_channels=16,
    scaling_factor=1.5305,
    shift_factor=0.0609,
)
_TINY_WIDTHS = (32, 64, 128, 128)

SPECS: dict[str, VAESpec] = {
    spec.name: spec
    for spec in (
        _SD21,
        replace(_SD21, name="cvvae-sd21-full3d", half_3d=False),
        _SD3,
        replace(_SD21, name="cvvae-sd21-tiny", widths=_TINY_WIDTHS),
        replace(_SD21, name="cvvae-sd21-full3d-tiny", half_3d=False, widths=_TINY_WIDTHS),
        replace(_SD3, name="cvvae-sd3-tiny", widths=_TINY_WIDTHS),
    )
}
