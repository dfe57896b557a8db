"""Cutting a video into tiles, running a function on each, and putting the answers together.

Time (CV-VAE section 3.2): tiles share one frame with the tile before. Each is computed on its own; the first output
frame of every later tile is the shared one and is dropped. Nothing is blended.
Space: square tiles that overlap; outputs are blended linearly over the overlap, rows first, then columns.

Plans are plain arithmetic and know neither models nor tensors; every model behind `VideoVAE` shares them. Sizes in a
plan are in the unit of the function's input unless the name says `out`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tile:
    """Frames [start, stop) computed on their own, whose first `drop` *output* frames repeat the tile before.

    For encoding start and stop count video frames and drop latent frames; for decoding it is the other way round.
    """

    start: int
    stop: int
    drop: int

    @property
    def num_frames(self) -> int:
        return self.stop - self.start


def plan_time_tiles(num_frames: int, *, stride: int | None) -> tuple[Tile, ...]:
    """Tiles of at most stride + 1 frames over `num_frames`, each sharing its first frame with the one before.

    The same rule plans both directions: in video frames with the stride of the spec, in latent frames with that
    stride over the time stride. `stride=None` is one tile over everything. ValueError if a number is not positive.
    """
    if num_frames < 1:
        raise ValueError(f"plan_time_tiles: expected num_frames >= 1, got {num_frames}")
    if stride is None:
        return (Tile(0, num_frames, 0),)
    if stride < 1:
        raise ValueError(f"plan_time_tiles: expected stride >= 1, got {stride}")
    starts = range(0, max(1, num_frames - 1), stride)
    return tuple(Tile(start, min(start + stride + 1, num_frames), int(start > 0)) for start in starts)


def apply_time_tiles(
    function: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiles: Sequence[Tile], *, num_frames_out: int
) -> Tensor:
    """Runs `function` on each tile of x_BCTHW and joins the answers in time: (B, C', num_frames_out, H', W').

    Without gradients each answer is written into its place at once, so beyond input and output the memory is that of
    one tile however long the video. With gradients the pieces are concatenated, which autograd handles better.
    """
    if len(tiles) == 1:  # joining would copy an answer that a streaming model has joined already
        (tile,) = tiles
        return function(x_BCTHW[:, :, tile.start : tile.stop])[:, :, tile.drop :].contiguous()
    pieces: list[Tensor] = []
    out_BCTHW: Tensor | None = None
    written = 0
    for tile in tiles:
        piece = function(x_BCTHW[:, :, tile.start : tile.stop])[:, :, tile.drop :]
        if piece.requires_grad:
            pieces.append(piece)
            continue
        if out_BCTHW is None:
            batch, channels, _, height, width = piece.shape
            out_BCTHW = piece.new_empty(batch, channels, num_frames_out, height, width)
        out_BCTHW[:, :, written : written + piece.shape[2]] = piece
        written += piece.shape[2]
    joined = torch.cat(pieces, dim=2) if out_BCTHW is None else out_BCTHW
    assert joined.shape[2] == num_frames_out
    assert out_BCTHW is None or written == num_frames_out
    return joined


@dataclass(frozen=True, slots=True)
class SpatialTiling:
    """Square tiles for one direction. `tile` and `stride` count input pixels (or latents), `out_*` output ones."""

    tile: int
    stride: int
    out_overlap: int
    out_stride: int
    past_edge: bool = False
    """A tile starts at every stride, also where the tile before already reached the edge (OD-VAE)."""

    @classmethod
    def for_encoding(cls, tile_size: int, *, overlap: float, space_stride: int) -> Self:
        """Pixel tiles in, latent tiles out. The roundings are the authors'. ValueError if they do not line up."""
        latent_tile = _latent_tile(tile_size, space_stride)
        stride = round(tile_size * (1 - overlap))
        out_overlap = round(latent_tile * overlap)
        out_stride = latent_tile - out_overlap
        _check_lined_up(tile_size, overlap, pixel_stride=stride, latent_stride=out_stride, scale=space_stride)
        return cls(tile_size, stride, out_overlap, out_stride)

    @classmethod
    def for_decoding(cls, tile_size: int, *, overlap: float, space_stride: int) -> Self:
        """Latent tiles in, pixel tiles out: `tile_size` stays in pixels. ValueError if they do not line up."""
        latent_tile = _latent_tile(tile_size, space_stride)
        stride = round(latent_tile * (1 - overlap))
        out_overlap = round(tile_size * overlap)
        out_stride = tile_size - out_overlap
        _check_lined_up(tile_size, overlap, pixel_stride=out_stride, latent_stride=stride, scale=space_stride)
        return cls(latent_tile, stride, out_overlap, out_stride)

    def starts(self, size: int) -> tuple[int, ...]:
        """Where tiles start along a side of `size`: every `stride` until a tile reaches the edge.

        The last tile may be small but is always longer than the overlap: the tile before it ends inside it. Not so
        with `past_edge`, where it may be of any length up to a stride.
        """
        if self.past_edge:
            return tuple(range(0, size, self.stride))
        starts = [0]
        while starts[-1] + self.tile < size:
            starts.append(starts[-1] + self.stride)
        return tuple(starts)


def _latent_tile(tile_size: int, space_stride: int) -> int:
    if tile_size < space_stride or tile_size % space_stride:
        raise ValueError(f"tile_size: expected a positive multiple of {space_stride}, got {tile_size}")
    return tile_size // space_stride


def _check_lined_up(tile_size: int, overlap: float, *, pixel_stride: int, latent_stride: int, scale: int) -> None:
    if latent_stride < 1 or pixel_stride != scale * latent_stride:
        raise ValueError(
            f"tile_size={tile_size} with tile_overlap={overlap}: expected pixel stride = {scale} * latent stride, "
            f"got {pixel_stride} and {latent_stride} after rounding, so tiles would not line up; "
            f"72, 144 and 576 do with overlap 0.2222 and stride 8"
        )


def apply_spatial_tiles(function: Callable[[Tensor], Tensor], x_BCTHW: Tensor, tiling: SpatialTiling) -> Tensor:
    """Runs `function` on overlapping squares of x_BCTHW and blends the answers into (B, C', T', H', W').

    Each tile is blended with the tile above, then with the tile to its left, both already blended themselves: the
    order decides the numbers in the corners. Nothing is blended in place, so gradients flow. Two rows of tile outputs
    are alive at a time, and the finished bands of one call.
    """
    height, width = x_BCTHW.shape[-2:]
    tops, lefts = tiling.starts(height), tiling.starts(width)
    if len(tops) == len(lefts) == 1:
        return function(x_BCTHW)
    bands: list[Tensor] = []
    row_above: list[Tensor] = []
    for top in tops:
        row: list[Tensor] = []
        for index, left in enumerate(lefts):
            piece = function(x_BCTHW[..., top : top + tiling.tile, left : left + tiling.tile])
            if row_above:
                piece = blend(row_above[index], piece, overlap=tiling.out_overlap, dim=-2)
            if row:
                piece = blend(row[-1], piece, overlap=tiling.out_overlap, dim=-1)
            row.append(piece)
        band = torch.cat([piece[..., : tiling.out_stride] for piece in row[:-1]] + row[-1:], dim=-1)
        bands.append(band if top == tops[-1] else band[..., : tiling.out_stride, :])
        row_above = row
    return torch.cat(bands, dim=-2)


def blend(before: Tensor, after: Tensor, *, overlap: int, dim: int) -> Tensor:
    """`after`, its first `overlap` entries along `dim` faded in over the last ones of `before`.

    The weight of `after` is 0, 1/overlap, ... (overlap - 1)/overlap: 0 at the seam itself, as the authors have it.
    What is shorter than the overlap is faded over its own length.
    """
    overlap = min(overlap, before.shape[dim], after.shape[dim])
    if overlap == 0:
        return after
    weight = torch.arange(overlap, device=after.device, dtype=torch.float32).div(overlap).to(after.dtype)
    weight = weight.view(-1, *[1] * (-dim - 1))
    tail = before.narrow(dim, before.shape[dim] - overlap, overlap)
    head = (1 - weight) * tail + weight * after.narrow(dim, 0, overlap)
    rest = after.narrow(dim, overlap, after.shape[dim] - overlap)
    return torch.cat([head, rest], dim=dim)
