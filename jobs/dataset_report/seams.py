"""Are tile borders seen in the decoded video? The error there against the error elsewhere.

In time: a border between two frames is a seam where a tile of the encoder or of the decoder begins. Measured is the
jump of the error across it, mean |e(t) - e(t - 1)| with e = decoded - source in [0, 1]: a shift that is the same on
both sides is no seam. Frames of one latent and frames of two differ in this anyway, so a seam is held against the
other borders between latents, and both against the inside of a latent's span.
In space: the error where tiles overlap and are blended, against the rest of the frame.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from cvvae import VAESpec
from cvvae.tiling import SpatialTiling
from pipeline.decode_back import WindowPair

SEAM, LATENT_BORDER, INSIDE = "tile borders", "other borders between latents", "within a latent's span"
OVERLAP, REST = "where tiles overlap in space", "elsewhere in the frame"


@dataclass(slots=True)
class SeamMeter:
    """Sums over the windows of one bucket; means by place."""

    spec: VAESpec
    _sums: dict[str, tuple[float, int]] = field(default_factory=lambda: defaultdict(lambda: (0.0, 0)))

    def add(self, pair: WindowPair) -> None:
        error_THWC = (pair.decoded_THWC.astype(np.float32) - pair.source_THWC.astype(np.float32)) / 255
        time, height, width, _ = error_THWC.shape
        if time > 1:
            jumps = np.abs(np.diff(error_THWC, axis=0)).mean(axis=(1, 2, 3))
            seams, borders = time_borders(self.spec, time)
            for number, jump in enumerate(jumps, start=1):
                place = SEAM if number in seams else LATENT_BORDER if number in borders else INSIDE
                self._note(place, float(jump), 1)
        overlap_HW = space_overlap(self.spec, time, height, width)
        if overlap_HW is not None:
            error_HW = np.abs(error_THWC).mean(axis=(0, 3))
            self._note(OVERLAP, float(error_HW[overlap_HW].sum()), int(overlap_HW.sum()))
            self._note(REST, float(error_HW[~overlap_HW].sum()), int((~overlap_HW).sum()))

    def _note(self, place: str, total: float, count: int) -> None:
        before, number = self._sums[place]
        self._sums[place] = before + total, number + count

    def means(self) -> dict[str, float]:
        """Mean by place, of those that the windows have; empty for single frames."""
        return {place: total / count for place, (total, count) in self._sums.items() if count}

    def ratio(self) -> float | None:
        """Tile borders over other borders between latents; None where there is not both."""
        means = self.means()
        return means[SEAM] / means[LATENT_BORDER] if means.get(LATENT_BORDER) and SEAM in means else None


def time_borders(spec: VAESpec, num_frames: int) -> tuple[set[int], set[int]]:
    """(frames before which a tile begins, frames before which the span of another latent begins)."""
    num_latents = spec.num_latent_frames(num_frames)
    seams = {tile.start + (1 if tile.drop else 0) for tile in spec.encode_tiles(num_frames)[1:]}
    for tile in spec.decode_tiles(num_latents)[1:]:
        seams.add(spec.frame_span(tile.start + (1 if tile.drop else 0))[0])
    return seams, {spec.frame_span(latent)[0] for latent in range(1, num_latents)}


def space_overlap(spec: VAESpec, num_frames: int, height: int, width: int) -> np.ndarray | None:
    """bool (H, W), True where tiles of the encoder or decoder overlap; None if neither cuts such frames."""
    encode = spec.encode_tiling_of(num_frames, height, width)
    scale = spec.space_stride
    decode = spec.decode_tiling_of(spec.num_latent_frames(num_frames), height // scale, width // scale)
    if encode is None and decode is None:
        return None
    masks = []
    for size in (height, width):
        mask = np.zeros(size, bool)
        for start, stop in [*_overlaps(encode, size, 1), *_overlaps(decode, size // scale, scale)]:
            mask[start:stop] = True
        masks.append(mask)
    return masks[0][:, None] | masks[1][None, :]


def _overlaps(tiling: SpatialTiling | None, size: int, scale: int) -> Sequence[tuple[int, int]]:
    """Pixel spans along a side that two tiles share; sizes of the tiling are `scale` pixels each."""
    if tiling is None:
        return []
    shared = tiling.tile - tiling.stride
    return [(start * scale, (start + shared) * scale) for start in tiling.starts(size)[1:]]
