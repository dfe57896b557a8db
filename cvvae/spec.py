"""`VAESpec`: the frozen facts of a video VAE.

A spec says everything but the weights that decides the numbers a VAE gives. Shapes of videos and latents follow from
it; no other file holds a stride as a literal. Each family has a subclass with the facts of its own architecture; the
named literals of all families are `cvvae.SPECS`.
"""

from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

from cvvae.tiling import SpatialTiling, Tile, plan_time_tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class VAESpec:
    """Strides, latent normalisation and tile plan of one VAE. Contradictions are a ValueError here.

    Videos have T = 1 + frame_unit * k frames and sides that are multiples of space_stride, values in `pixel_range`.
    The first frame has a latent frame of its own; each later one stands for time_stride frames. Families with other
    rules override `frame_unit`, or `is_valid_num_frames` and `frames_rule`, with `num_latent_frames`,
    `num_video_frames` and `frame_span`; with another temporal tile plan, `encode_tiles`, `decode_tiles` and
    `longest_tile`.
    Normalised latents are (z - shift_factor) * scaling_factor; a tuple holds one value per latent channel.
    """

    name: str
    family: str
    """Which module tree and key names: a key of `cvvae.families.FAMILIES`."""
    in_channels: int = 3
    latent_channels: int
    time_stride: int = 4
    space_stride: int = 8
    scaling_factor: float | tuple[float, ...]
    shift_factor: float | tuple[float, ...]
    tile_frames: int | None = None
    """Video frames from one temporal tile to the next; a tile holds one more. None: never tile."""
    tile_size: int | None = None
    """Side of a spatial tile in pixels; larger videos are tiled. None: never tile."""
    tile_overlap: float = 0.2222
    pixel_range: tuple[float, float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        self._require_positive("in_channels", "latent_channels", "time_stride", "space_stride")
        for field in ("scaling_factor", "shift_factor"):
            value = getattr(self, field)
            if isinstance(value, tuple) and len(value) != self.latent_channels:
                raise ValueError(
                    f"VAESpec {self.name!r}: {field}: expected one number or one per latent channel "
                    f"({self.latent_channels}), got {len(value)}"
                )
        if 0 in (self.scaling_factor if isinstance(self.scaling_factor, tuple) else (self.scaling_factor,)):
            raise ValueError(f"VAESpec {self.name!r}: scaling_factor: expected numbers other than 0, got 0")
        self._check_tile_frames()
        if not 0 <= self.tile_overlap <= 0.5:
            # beyond one half a tile would overlap the one before its neighbour
            raise ValueError(f"VAESpec {self.name!r}: tile_overlap: expected 0 to 0.5, got {self.tile_overlap}")
        _ = self.encode_tiling, self.decode_tiling  # raise here what would give wrong shapes later

    def _require_positive(self, *names: str) -> None:
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"VAESpec {self.name!r}: {name}: expected >= 1, got {getattr(self, name)}")

    def _check_tile_frames(self) -> None:
        if self.tile_frames is not None and (self.tile_frames < 1 or self.tile_frames % self.time_stride):
            raise ValueError(
                f"VAESpec {self.name!r}: tile_frames: expected a positive multiple of "
                f"time_stride={self.time_stride} or None, got {self.tile_frames}"
            )

    # --- temporal and spatial tiles ------------------------------------------------------------------------------

    @property
    def latent_tile_frames(self) -> int | None:
        """Latent frames from one temporal tile to the next."""
        return None if self.tile_frames is None else self.tile_frames // self.time_stride

    @property
    def longest_tile(self) -> int | None:
        """Video frames of a whole temporal tile. None: a tile may have any length."""
        return None if self.tile_frames is None else self.tile_frames + 1

    def encode_tiles(self, num_frames: int) -> tuple[Tile, ...]:
        """The temporal tiles of a video: start and stop in video frames, `drop` in latent frames."""
        return plan_time_tiles(num_frames, stride=self.tile_frames)

    def decode_tiles(self, num_latent_frames: int) -> tuple[Tile, ...]:
        """The temporal tiles of a latent: start and stop in latent frames, `drop` in video frames."""
        return plan_time_tiles(num_latent_frames, stride=self.latent_tile_frames)

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

    def encode_tiling_of(self, num_frames: int, height: int, width: int) -> SpatialTiling | None:
        """How each temporal tile of a (T, H, W) video is cut in space; None if not at all.

        `num_frames` is the whole video's: OD-VAE cuts in space what it cuts in time.
        """
        tiling = self.encode_tiling
        return tiling if tiling is not None and max(height, width) > tiling.tile else None

    def decode_tiling_of(self, num_latent_frames: int, height: int, width: int) -> SpatialTiling | None:
        """The same for a (t, h, w) latent."""
        tiling = self.decode_tiling
        return tiling if tiling is not None and max(height, width) > tiling.tile else None

    # --- which videos, and which latents follow ------------------------------------------------------------------

    @property
    def frame_unit(self) -> int:
        """Valid videos have 1 + frame_unit * k frames, where the family has no other rule."""
        return self.time_stride

    @property
    def frames_rule(self) -> str:
        """The valid video lengths, in words for error messages."""
        return f"1 + {self.frame_unit}*k"

    def is_valid_num_frames(self, num_frames: int) -> bool:
        """Whether a video of that many frames can be encoded without dropping any."""
        return num_frames >= 1 and (num_frames - 1) % self.frame_unit == 0

    def largest_valid_num_frames(self, num_frames: int) -> int:
        """The longest valid video length that is at most `num_frames`. ValueError if there is none."""
        if num_frames < 1:
            raise ValueError(f"num_frames: expected at least 1, got {num_frames}")
        for shorter in range(num_frames, 0, -1):
            if self.is_valid_num_frames(shorter):
                return shorter
        raise ValueError(f"video frames T: expected {self.frames_rule} for spec {self.name!r}, got {num_frames}")

    def num_latent_frames(self, num_frames: int) -> int:
        """Latent frames of a valid video length; ValueError names the nearest valid one."""
        self._check_num_frames(num_frames)
        return 1 + (num_frames - 1) // self.time_stride

    def _check_num_frames(self, num_frames: int) -> None:
        if num_frames < 1:
            raise ValueError(f"video frames T: expected at least 1, got {num_frames}")
        if not self.is_valid_num_frames(num_frames):
            shorter = next((number for number in range(num_frames, 0, -1) if self.is_valid_num_frames(number)), None)
            longer = next(number for number in count(num_frames) if self.is_valid_num_frames(number))
            raise ValueError(
                f"video frames T: expected {self.frames_rule} for spec {self.name!r}, got {num_frames}; "
                f"the nearest shorter is {shorter}, the nearest longer {longer}"
            )

    def num_video_frames(self, num_latent_frames: int) -> int:
        """Video frames that decoding gives."""
        if num_latent_frames < 1:
            raise ValueError(f"latent frames t: expected at least 1, got {num_latent_frames}")
        return 1 + (num_latent_frames - 1) * self.time_stride

    @property
    def prefix_exact(self) -> bool:
        """Whether a video's first frames give (to rounding) the first latents of the whole video, at every valid
        length. What streams does; a norm over time, attention to later frames or temporal tiles break it."""
        return False

    def has_exact_prefix(self, num_frames: int, prefix_frames: int, height: int, width: int) -> bool:
        """Whether the first latents of a (T, H, W) video are those of its first `prefix_frames` frames alone.

        So it is at every valid length if `prefix_exact`; else where the prefix's temporal tiles, and how they are cut
        in space, are the video's own first ones. ValueError on a length or a side that does not fit.
        """
        self.latent_shape(num_frames, height, width)
        self.latent_shape(prefix_frames, height, width)
        if prefix_frames > num_frames:
            raise ValueError(f"prefix_frames: expected at most {num_frames}, got {prefix_frames}")
        if self.prefix_exact or prefix_frames == num_frames:
            return True
        tilings = {self.encode_tiling_of(number, height, width) for number in (num_frames, prefix_frames)}
        tiles = self.encode_tiles(prefix_frames)
        return len(tilings) == 1 and tiles == self.encode_tiles(num_frames)[: len(tiles)]

    def frame_span(self, latent_frame: int) -> tuple[int, int]:
        """The video frames [start, stop) that a latent frame stands for."""
        if latent_frame == 0:
            return 0, 1
        return 1 + (latent_frame - 1) * self.time_stride, 1 + latent_frame * self.time_stride

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
        return {key: _plain(value) for key, value in asdict(self).items()}


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, tuple) else value
