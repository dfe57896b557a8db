"""Proof that tiles are right: some windows encoded again, by themselves, and compared with what the batches gave.

Two references. `alone`: the window through `VideoVAE.encode`, the model's own way, without the neighbours, the filler
and the joining of this pipeline; the two are equal up to rounding. `untiled`: one pass over all frames, without tiles
in time; how far that is from tiles is a property of the VAE, and what tiling costs in exactness.

Which windows is a function of their keys, so every attempt at a shard proves the same ones and its receipt is the
same. A deviation is the RMS of the difference over the RMS of the reference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.documents import TileProof
from pipeline.encoder import StageClock, TileEncoder
from pipeline.errors import ShardError
from pipeline.records import LatentRow


@dataclass(frozen=True, slots=True)
class Deviation:
    """Of one window from one reference."""

    largest: float
    """Absolute difference of two values."""
    relative_rms: float

    @classmethod
    def between(cls, found: Tensor, reference: Tensor) -> Deviation:
        """Two tensors of one shape. A reference without any signal counts as an RMS of 1."""
        difference = (found - reference).double()
        scale = float(reference.double().square().mean().sqrt()) or 1.0
        return cls(float(difference.abs().max()), float(difference.square().mean().sqrt()) / scale)


class TileProver:
    """Proves a share of the windows of one shard."""

    def __init__(self, shard_id: str, encoder: TileEncoder, clock: StageClock) -> None:
        self._shard_id = shard_id
        self._encoder = encoder
        self._policy = encoder.policy
        self._clock = clock
        self._found: dict[int, tuple[LatentRow, Deviation, Deviation | None]] = {}
        """By the row's id; with the row, so that no other can have its id."""

    def chooses(self, key: str) -> bool:
        """Whether a window is to be proved."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self._policy.proof_share * 2**64

    def check(self, row: LatentRow, frames_THWC: np.ndarray, mean_CTHW: Tensor) -> None:
        """Compare a window's means, float32 as encoded, with both references. ShardError above a limit."""
        with self._clock.measure("tile proof"):
            alone = Deviation.between(mean_CTHW, self._encoder.encode_alone(frames_THWC))
            whole_CTHW = self._encoder.encode_untiled(frames_THWC)
            untiled = None if whole_CTHW is None else Deviation.between(mean_CTHW, whole_CTHW)
        self._require(row.key, alone, self._policy.proof_limit, "encoded by itself", "encode.proof_limit")
        if untiled is not None:
            limit = self._policy.proof_untiled_limit
            self._require(row.key, untiled, limit, "encoded in one pass", "encode.proof_untiled_limit")
        self._found[id(row)] = row, alone, untiled

    def _require(self, key: str, deviation: Deviation, limit: float | None, reference: str, setting: str) -> None:
        if limit is not None and not deviation.relative_rms <= limit:  # NaN is above any
            raise ShardError(
                self._shard_id,
                f"tile proof: {key} deviates from the same window {reference} by {deviation.relative_rms:.3g} "
                f"(relative RMS; largest difference {deviation.largest:.3g}), {setting} is {limit:g}. Nothing of the "
                "shard was stored",
            )

    def summary(self, rows: Iterable[LatentRow]) -> TileProof | None:
        """The worst over the rows that are stored; None if none of them was proved."""
        proved = [self._found[id(row)] for row in rows if id(row) in self._found]
        if not proved:
            return None
        untiled = [other for _, _, other in proved if other is not None]
        return TileProof(
            windows=len(proved),
            alone_largest=max(one.largest for _, one, _ in proved),
            alone_relative_rms=max(one.relative_rms for _, one, _ in proved),
            windows_of_many_tiles=len(untiled),
            untiled_largest=max((one.largest for one in untiled), default=None),
            untiled_relative_rms=max((one.relative_rms for one in untiled), default=None),
        )
