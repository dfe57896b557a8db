"""How far a stored dataset's latents are from those that another VAE would give: on a seeded sample of its windows.

The sampled windows' clips are read from the source again and cut as the dataset records. The recorded VAE encodes
them first, as a control: it must give what is stored, or source, decoder or weights are not what they were and
nothing else can be believed. Then the other VAE, and both decoders on both latents.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvvae import VideoVAE
from cvvae.compatibility import LatentComparison
from cvvae.metrics import psnr_of_frames, to_unit_range
from pipeline.cut_again import cut_again
from pipeline.dataset import DatasetFolder
from pipeline.decode.pool import DecodePool
from pipeline.documents import RunFile, RunIdentity, ShardReceipt
from pipeline.errors import ConfigError, DatasetError, PipelineError, SourceError
from pipeline.formats import FORMATS, IndexRow, read_index
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.policies import DTypeName
from pipeline.recorded import recorded_decoding, recorded_shard, recorded_source
from pipeline.records import Latent

Decoding = Literal["old_on_old", "new_on_new", "new_on_old", "old_on_new"]
DECODINGS: dict[Decoding, str] = {
    "old_on_old": "recorded decoder, stored latents",
    "new_on_new": "new decoder, new latents",
    "new_on_old": "new decoder, stored latents",
    "old_on_new": "recorded decoder, new latents",
}
_STORAGE_ERROR: dict[DTypeName, float] = {"float32": 1e-4, "float16": 1e-3, "bfloat16": 8e-3}
_COMPUTE_ERROR: dict[DTypeName, float] = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 5e-2}
"""Relative RMS that rounding may cause: a few times what docs/numerics.md has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftSample:
    """Which windows are looked at: so many at random, of so many shards at random. Each shard's source is read from
    its start up to the last clip that is wanted."""

    windows: int = 32
    shards: int = 4
    seed: int = 0


@dataclass(slots=True)
class DriftReport:
    """What was found. All latents normalised by the recorded VAE's shift and scale."""

    control: LatentComparison
    """Recorded VAE, encoding again, against what is stored."""
    drift: LatentComparison
    """New VAE against what is stored."""
    control_limit: float
    """Relative RMS up to which the control counts as equal."""
    psnr: dict[Decoding, list[float]] = field(default_factory=lambda: {name: [] for name in DECODINGS})
    """dB of each window against its source frames."""
    keys: list[str] = field(default_factory=list)
    """The windows that were looked at."""
    problems: list[str] = field(default_factory=list)
    """Windows of the sample that could not be."""

    @property
    def control_holds(self) -> bool:
        return self.control.relative_rms <= self.control_limit

    def mean_psnr(self, decoding: Decoding) -> float:
        return float(np.mean(self.psnr[decoding]))

    @property
    def decoder_loss(self) -> float:
        """dB by which the new decoder is worse on stored latents than on its own."""
        return self.mean_psnr("new_on_new") - self.mean_psnr("new_on_old")


class SampledWindow(NamedTuple):
    """A stored latent and the frames it was made of."""

    latent: Latent
    frames_THWC: np.ndarray


def measure_drift(
    folder: DatasetFolder,
    recorded: VideoVAE,
    new: VideoVAE,
    sample: DriftSample,
    *,
    device: torch.device,
    decode_children: int = 1,
) -> DriftReport:
    """Compare on the sample; the VAEs are moved to the device, in the dtype that the dataset was encoded in.

    ConfigError if a VAE is not the recorded one or the new one's latents have another shape, DatasetError for an
    empty dataset, SourceError if not a single window can be read from the source again.
    """
    run = folder.run_file()
    identity = run.identity
    check_vaes(identity, recorded, new)
    dtype = TORCH_DTYPES[identity.compute_dtype]
    recorded, new = (vae.eval().requires_grad_(False).to(device=device, dtype=dtype) for vae in (recorded, new))
    report = DriftReport(
        LatentComparison.empty(recorded.spec.latent_channels),
        LatentComparison.empty(recorded.spec.latent_channels),
        _STORAGE_ERROR[identity.storage_dtype] + _COMPUTE_ERROR[identity.compute_dtype],
    )
    with DecodePool(recorded_decoding(run), decode_children) as pool:
        for receipt, rows in choose_windows(folder, sample):
            latents = _stored(folder, run, receipt, rows)
            for window in _sampled(run, receipt, latents, pool, report.problems):
                _compare(report, window, recorded, new)
    if not report.keys:
        raise SourceError("none of the sampled windows can be read from the source again: " + report.problems[0])
    return report


def check_vaes(identity: RunIdentity, recorded: VideoVAE, new: VideoVAE) -> None:
    """ConfigError unless the first is the dataset's own and the second gives latents of the same shape."""
    if recorded.weights_sha256 != identity.weights_sha256:
        raise ConfigError(
            f"the recorded VAE: expected weights of sha256 {identity.weights_sha256}, got {recorded.weights_sha256}: "
            "say with --recorded where the dataset's own VAE lies now"
        )
    facts = ("latent_channels", "time_stride", "space_stride")
    wrong = [
        f"{name}: expected {getattr(recorded.spec, name)}, got {getattr(new.spec, name)}"
        for name in facts
        if getattr(recorded.spec, name) != getattr(new.spec, name)
    ]
    if wrong or not new.spec.is_valid_num_frames(identity.windows.frames):
        what = "; ".join(wrong) or f"windows of {identity.windows.frames} frames are none it takes"
        raise ConfigError(
            f"--vae {new.spec.name}: its latents cannot be those of {recorded.spec.name} ({what}): encode "
            "another dataset with it"
        )


def choose_windows(folder: DatasetFolder, sample: DriftSample) -> list[tuple[ShardReceipt, list[IndexRow]]]:
    """Committed shards and rows of each: a function of the dataset and the seed. DatasetError if there are none."""
    rng = random.Random(sample.seed)
    ids = sorted(folder.receipt_ids())
    rng.shuffle(ids)
    receipts: list[ShardReceipt] = []
    for shard_id in ids:
        receipt = folder.receipt(shard_id)
        if receipt.counts.windows_stored:
            receipts.append(receipt)
        if len(receipts) == sample.shards:
            break
    places = [(receipt, number) for receipt in receipts for number in range(receipt.counts.windows_stored)]
    if not places:
        raise DatasetError(f"{folder.store.full_url('')}: no shard with a window is committed")
    chosen = rng.sample(places, min(sample.windows, len(places)))
    by_shard: dict[str, list[int]] = {}
    for receipt, number in chosen:
        by_shard.setdefault(receipt.shard_id, []).append(number)
    return [
        (receipt, _rows(folder, receipt, sorted(by_shard[receipt.shard_id])))
        for receipt in receipts
        if receipt.shard_id in by_shard
    ]


def _rows(folder: DatasetFolder, receipt: ShardReceipt, numbers: Sequence[int]) -> list[IndexRow]:
    with tempfile.TemporaryDirectory(prefix="latents-drift-") as scratch:
        try:
            rows = read_index(folder.store.local_file(receipt.index.path, Path(scratch))).rows
        except FileNotFoundError as error:
            raise DatasetError(f"shard {receipt.shard_id}: {receipt.index.path} does not exist") from error
    if len(rows) != receipt.counts.windows_stored:
        raise DatasetError(
            f"shard {receipt.shard_id}: expected {receipt.counts.windows_stored} rows in its index, got {len(rows)}: "
            "run latents verify"
        )
    return [rows[number] for number in numbers]


def _stored(folder: DatasetFolder, run: RunFile, receipt: ShardReceipt, rows: list[IndexRow]) -> list[Latent]:
    try:
        with folder.store.open_seekable(receipt.payload.path) as file:
            return list(FORMATS[run.format].fetch(file, rows))
    except FileNotFoundError as error:
        raise DatasetError(f"shard {receipt.shard_id}: {receipt.payload.path} does not exist") from error


# --- the source again ---------------------------------------------------------------------------------------------


def _sampled(
    run: RunFile, receipt: ShardReceipt, latents: Sequence[Latent], pool: DecodePool, problems: list[str]
) -> Iterator[SampledWindow]:
    """The frames of each latent; what cannot be had is added to `problems`, once for each window."""
    left = {latent.row.key: latent for latent in latents}
    rows = [latent.row for latent in latents]
    try:
        for row, window in cut_again(run, recorded_shard(receipt), recorded_source(run), rows, pool):
            latent = left.pop(row.key)
            if isinstance(window, str):
                problems.append(f"{row.key}: {window}")
            else:
                yield SampledWindow(latent, window.frames_THWC)
    except (PipelineError, OSError) as error:
        problems += [f"{key}: the source of shard {receipt.shard_id} cannot be read: {error}" for key in left]


# --- a window -------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def _compare(report: DriftReport, window: SampledWindow, recorded: VideoVAE, new: VideoVAE) -> None:
    source_BCTHW = (
        torch.from_numpy(window.frames_THWC.copy()).to(recorded.device).permute(3, 0, 1, 2)[None].float() / 255
    )
    stored_BCTHW = window.latent.mean_CTHW[None].to(recorded.device).float()
    found = {name: _encode(vae, source_BCTHW) for name, vae in (("old", recorded), ("new", new))}
    stored = recorded.normalize(stored_BCTHW)
    report.control.add(recorded.normalize(found["old"]), stored)
    report.drift.add(recorded.normalize(found["new"]), stored)
    latents = {"old": stored_BCTHW, "new": found["new"]}
    for decoding in DECODINGS:
        decoder, of = decoding.split("_on_")
        vae = recorded if decoder == "old" else new
        decoded_BCTHW = to_unit_range(vae.decode(latents[of].to(vae.dtype)), vae.spec.pixel_range)
        report.psnr[decoding].append(float(psnr_of_frames(decoded_BCTHW, source_BCTHW).mean()))
    report.keys.append(window.latent.row.key)


def _encode(vae: VideoVAE, source_BCTHW: Tensor) -> Tensor:
    low, high = vae.spec.pixel_range
    return vae.encode((source_BCTHW * (high - low) + low).to(vae.dtype)).mode().float()
