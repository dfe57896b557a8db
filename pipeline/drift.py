"""How far a stored dataset's latents are from those that another VAE would give: on a seeded sample of its windows.

The sampled windows' clips are read from the source again and cut as the dataset records. The recorded VAE encodes
them first, as a control: it must give what is stored, or source, decoder or weights are not what they were and
nothing else can be believed. Then the other VAE, and both decoders on both latents.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cvvae import VAESpec, VideoVAE
from cvvae.compatibility import LatentComparison
from cvvae.metrics import psnr_of_frames, to_unit_range
from pipeline.dataset import DatasetFolder
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodePool, WindowReady
from pipeline.documents import RunFile, RunIdentity, ShardReceipt
from pipeline.errors import ConfigError, DatasetError, PipelineError, SourceError
from pipeline.formats import FORMATS, IndexRow, read_index
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.policies import DTypeName
from pipeline.recorded import recorded_decoding, recorded_shard, recorded_source
from pipeline.records import Clip, Latent, Window
from pipeline.sources import SourceDigest, SourceSpec, read_shard
from pipeline.windows import valid_lengths

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
            source = _Source(run, receipt, recorded.spec, pool)
            for window in source.windows(_stored(folder, run, receipt, rows), report.problems):
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


class _Source:
    """The input of one shard, read and cut as it was when the shard was made."""

    def __init__(self, run: RunFile, receipt: ShardReceipt, spec: VAESpec, pool: DecodePool) -> None:
        self._identity = run.identity
        self._spec: SourceSpec = recorded_source(run)
        self._receipt = receipt
        self._lengths = valid_lengths(run.identity.windows, spec.is_valid_num_frames)
        self._pool = pool

    def windows(self, latents: Sequence[Latent], problems: list[str]) -> Iterator[SampledWindow]:
        """The frames of each latent; what cannot be had is added to `problems`, once for each window."""
        wanted: dict[str, dict[int, Latent]] = {}
        for latent in latents:
            wanted.setdefault(latent.row.clip_key, {})[latent.row.window_index] = latent
        why = "not in the source any more"
        try:
            yield from self._decoded(wanted, problems)
        except (PipelineError, OSError) as error:
            why = f"the source of shard {self._receipt.shard_id} cannot be read: {error}"
        problems += [f"{latent.row.key}: {why}" for of_clip in wanted.values() for latent in of_clip.values()]

    def _decoded(self, wanted: dict[str, dict[int, Latent]], problems: list[str]) -> Iterator[SampledWindow]:
        """Takes what it gives, or names as a problem, out of `wanted`."""
        given: list[Window] = []
        clips = self._clips(wanted, problems)
        identity = self._identity
        with closing(self._pool.decode(clips, identity.windows, identity.resize, self._lengths)) as events:
            for event in events:
                match event:
                    case WindowReady(window, clip):
                        if window.index in wanted[clip.key]:
                            given.append(window)
                    case ClipRetracted():
                        given.clear()
                    case ClipDone(clip, _, rejection):
                        latents = wanted.pop(clip.key)
                        for window in given:
                            latent = latents.pop(window.index)
                            if _is_of(latent, window):
                                yield SampledWindow(latent, window.frames_THWC)
                            else:
                                problems.append(f"{latent.row.key}: other frames than were encoded")
                        why = rejection.message if rejection else "the clip is shorter now"
                        problems += [f"{latent.row.key}: cannot be cut again: {why}" for latent in latents.values()]
                        given.clear()

    def _clips(self, wanted: dict[str, dict[int, Latent]], problems: list[str]) -> Iterator[Clip]:
        """The wanted clips that are still what they were; reads no further than the last of them."""
        left = set(wanted)
        shard = recorded_shard(self._receipt)
        with closing(read_shard(shard, self._spec, max_clip_bytes=1 << 62, digest=SourceDigest())) as samples:  # type: ignore[type-var] - a generator
            for sample in samples:
                if isinstance(sample, Clip):
                    if sample.key not in left:
                        sample.video.close()
                        continue
                    left.discard(sample.key)
                    expected = {latent.row.pair_sha256 for latent in wanted[sample.key].values()}
                    if expected == {sample.pair_sha256}:
                        yield sample
                    else:
                        sample.video.close()
                        latents = wanted.pop(sample.key).values()
                        problems += [f"{one.row.key}: the source has another video or caption" for one in latents]
                if not left:
                    return


def _is_of(latent: Latent, window: Window) -> bool:
    row = latent.row
    return window.shape == (row.num_frames, row.height, row.width) and window.frame_indices == row.frame_indices


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
