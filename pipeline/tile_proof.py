"""Proof that tiles are right: some windows encoded again, by themselves, and compared with what the batches gave.

Two references. `alone`: the window through `VideoVAE.encode`, the model's own way, without the neighbours, the filler
and the joining of this pipeline; the two are equal up to rounding. `untiled`: one pass over all frames, without tiles
in time; how far that is from tiles is a property of the VAE, and what tiling costs in exactness.

Which windows is a function of their keys, so every attempt at a shard proves the same ones and its receipt is the
same. A deviation is the RMS of the difference over the RMS of the reference.

Both references need memory for all frames of a window at once. A window whose reference does not fit on the device is
not proven and counted as such; its latents came from tiles, which fit, and are stored.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from pipeline.documents import TileProof
from pipeline.encoder import StageClock, TileEncoder
from pipeline.errors import ShardError
from pipeline.records import LatentRow

log = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class _Proved:
    """What a chosen window was found to be."""

    row: LatentRow
    alone: Deviation | None
    untiled: Deviation | None
    out_of_memory: bool
    """A reference did not fit on the device."""


class TileProver:
    """Proves a share of the windows of one shard."""

    def __init__(self, shard_id: str, encoder: TileEncoder, clock: StageClock) -> None:
        self._shard_id = shard_id
        self._encoder = encoder
        self._policy = encoder.policy
        self._clock = clock
        self._found: dict[int, _Proved] = {}
        """By the row's id; with the row, so that no other can have its id."""

    def chooses(self, key: str) -> bool:
        """Whether a window is to be proved."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self._policy.proof_share * 2**64

    def check(self, row: LatentRow, frames_THWC: np.ndarray, mean_CTHW: Tensor) -> None:
        """Compare a window's means, float32 as encoded, with both references. ShardError above a limit."""
        references = [self._encoder.encode_alone]
        if self._encoder.can_be_untiled(len(frames_THWC)):
            references.append(self._encoder.encode_untiled)
        with self._clock.measure("tile proof"):
            encoded = [encode(frames_THWC) for encode in references]
            found = [None if other is None else Deviation.between(mean_CTHW, other) for other in encoded]
        alone, untiled = found[0], found[1] if len(found) > 1 else None
        if alone is not None:
            self._require(row.key, alone, self._policy.proof_limit, "encoded by itself", "encode.proof_limit")
        if untiled is not None:
            limit = self._policy.proof_untiled_limit
            self._require(row.key, untiled, limit, "encoded in one pass", "encode.proof_untiled_limit")
        if None in found:
            log.warning("tile proof: not proven: out of memory: shard=%s key=%s", self._shard_id, row.key)
        self._found[id(row)] = _Proved(row, alone, untiled, out_of_memory=None in found)

    def _require(self, key: str, deviation: Deviation, limit: float | None, reference: str, setting: str) -> None:
        if limit is not None and not deviation.relative_rms <= limit:  # NaN is above any
            raise ShardError(
                self._shard_id,
                f"tile proof: {key} deviates from the same window {reference} by {deviation.relative_rms:.3g} "
                f"(relative RMS; largest difference {deviation.largest:.3g}), {setting} is {limit:g}. Nothing of the "
                "shard was stored",
            )

    def summary(self, rows: Iterable[LatentRow]) -> TileProof | None:
        """The worst over the rows that are stored; None if none of them was chosen."""
        proved = [self._found[id(row)] for row in rows if id(row) in self._found]
        if not proved:
            return None
        alone = [one.alone for one in proved if one.alone is not None]
        untiled = [one.untiled for one in proved if one.untiled is not None]
        return TileProof(
            windows=len(alone),
            alone_largest=max((one.largest for one in alone), default=None),
            alone_relative_rms=max((one.relative_rms for one in alone), default=None),
            windows_of_many_tiles=len(untiled),
            untiled_largest=max((one.largest for one in untiled), default=None),
            untiled_relative_rms=max((one.relative_rms for one in untiled), default=None),
            windows_out_of_memory=sum(one.out_of_memory for one in proved),
        )
