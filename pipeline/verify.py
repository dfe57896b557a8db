"""Check a dataset against its own documents, and against its source.

Plain verification trusts nothing but run.json: receipts must add up to the manifest, every object must have the
bytes its receipt names, every index row must lead to its latent, every latent must be finite and of the shape the
VAE gives, and the statistics must come out the same. With the source at hand it also reads every sample again and
recomputes the hash that pairs key, video bytes and caption.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from cvvae import VAESpec, spec_from_dict
from pipeline.dataset import MANIFEST, DatasetFolder, describe_file
from pipeline.documents import Manifest, RunFile, ShardReceipt, StoredObject
from pipeline.errors import DatasetError, PipelineError
from pipeline.formats import FORMATS, IndexRow, read_index, read_payload
from pipeline.formats.tensors import STORED_DTYPES
from pipeline.manifest import build_manifest, rows_per_bucket, rows_per_decoder
from pipeline.recorded import recorded_shard
from pipeline.records import Clip, Latent
from pipeline.sources import SourceDigest, SourceSpec, read_shard
from pipeline.stats import ChannelStatistics
from pipeline.storage import Store


@dataclass(slots=True)
class VerifyReport:
    """What was looked at, and what is wrong. A dataset is good if `problems` is empty."""

    shards: int = 0
    windows: int = 0
    payload_bytes: int = 0
    source_clips: int = 0
    problems: list[str] = field(default_factory=list)
    to_encode: set[str] = field(default_factory=set)
    """Ids of the shards that must be encoded again: `latents repair` does."""
    set_aside: tuple[str, ...] = ()
    """Shards that are not in the dataset because they ended their encode actor too often."""

    @property
    def good(self) -> bool:
        return not self.problems


def verify_dataset(
    store: Store, *, source: SourceSpec | None = None, on_shard: Callable[[int, int], None] | None = None
) -> VerifyReport:
    """Check all of it, whatever is found. `source` also re-reads the input. Calls `on_shard(done, total)` as it
    goes. An unfinished dataset is a problem; its committed shards are checked all the same."""
    report = VerifyReport()
    folder = DatasetFolder(store)
    try:
        run = folder.run_file()
    except DatasetError as error:
        report.problems.append(f"{store.full_url('')} is not a dataset: {error}")
        return report
    if run.identity.fingerprint != run.fingerprint:
        found = run.identity.fingerprint
        report.problems.append(f"run.json: fingerprint {run.fingerprint} is not that of its identity ({found})")
    ids = folder.receipt_ids()
    manifest = _manifest(folder, len(ids), report)
    report.problems += _missing_and_stray(store, run, ids, manifest)
    report.to_encode |= {shard.id for shard in manifest.shards} - set(ids) if manifest else set()
    checked = _checked_receipts(folder, run, ids, report, source, on_shard)
    before = len(report.problems)
    try:
        expected = build_manifest(run, checked, manifest.set_aside if manifest else ())
    except ValueError as error:
        report.problems.append(f"receipts do not add up: {error}")
        for _ in checked:  # the other shards are looked at all the same
            pass
    else:
        unread = report.shards < len(ids)
        if manifest is not None and not unread:
            report.problems[before:before] = _manifest_problems(expected, manifest)
    return report


def _manifest(folder: DatasetFolder, committed: int, report: VerifyReport) -> Manifest | None:
    """The manifest, if it is there and can be read; if not, that is a problem."""
    if folder.store.info(MANIFEST) is None:
        report.problems.append(
            f"not finished: there is no {MANIFEST}; shards committed: {committed}. Start the encode job again."
        )
        return None
    try:
        manifest = folder.manifest()
    except DatasetError as error:
        report.problems.append(f"{error}; start the encode job again to have it written anew")
        return None
    report.set_aside = manifest.set_aside
    return manifest


def _checked_receipts(
    folder: DatasetFolder,
    run: RunFile,
    ids: Sequence[str],
    report: VerifyReport,
    source: SourceSpec | None,
    on_shard: Callable[[int, int], None] | None,
) -> Iterator[ShardReceipt]:
    """The receipts that can be read, each after its shard was checked; what is wrong goes into the report."""
    for number, shard_id in enumerate(ids):
        if on_shard is not None:
            on_shard(number, len(ids))
        try:
            receipt = folder.receipt(shard_id)
            receipt.counts.check("its receipt")
        except DatasetError as error:
            report.problems.append(f"shard {shard_id}: {error}")
            report.to_encode.add(shard_id)
            continue
        with tempfile.TemporaryDirectory(prefix="latents-verify-") as scratch:
            found = list(_check_shard(folder.store, run, receipt, Path(scratch), report, source))
        report.problems += [f"shard {shard_id}: {text}" for text in found]
        report.to_encode |= {shard_id} if found else set()
        yield receipt
    if on_shard is not None:
        on_shard(len(ids), len(ids))


def _missing_and_stray(store: Store, run: RunFile, ids: Sequence[str], manifest: Manifest | None) -> Iterator[str]:
    """Shards of a finished dataset whose receipt is gone; and objects that no receipt describes, which would be read
    by whoever takes all of a folder."""
    finished = {shard.id for shard in manifest.shards} if manifest else set()
    for shard_id in sorted(finished - set(ids)):
        yield f"shard {shard_id}: {MANIFEST} lists it, but it has no receipt: start the encode job again"
    suffix = FORMATS[run.format].suffix
    for folder, ending in (("shards", suffix), ("index", ".parquet")):
        known = {f"{shard_id}{ending}" for shard_id in finished.union(ids)}
        for name in store.names(folder, ""):
            if name not in known:
                yield (
                    f"{folder}/{name} has no receipt: left by an attempt that did not end. Start the encode job "
                    "again if its shard is in the source, else `latents gc --delete` removes it"
                )


def _manifest_problems(expected: Manifest, manifest: Manifest) -> Iterator[str]:
    for name in type(manifest).model_fields:
        if getattr(expected, name) != getattr(manifest, name):
            yield f"{MANIFEST}: {name} is not what the receipts add up to"


def _check_shard(
    store: Store,
    run: RunFile,
    receipt: ShardReceipt,
    scratch: Path,
    report: VerifyReport,
    source: SourceSpec | None,
) -> Iterator[str]:
    report.shards += 1
    report.payload_bytes += receipt.payload.size
    if receipt.fingerprint != run.fingerprint:
        yield f"receipt has fingerprint {receipt.fingerprint}, run.json has {run.fingerprint}"
    files: list[Path] = []
    for stored in (receipt.payload, receipt.index):
        try:
            path = store.local_file(stored.path, scratch)
        except FileNotFoundError:
            yield f"{stored.path} does not exist"
            return
        yield from _object_problems(stored, path)
        files.append(path)
    try:
        rows = read_index(files[1]).rows
        yield from _content_problems(run, receipt, files[0], rows, report)
    except (PipelineError, ValueError) as error:
        yield f"cannot be read: {error}"
        return
    if source is not None:
        try:
            yield from _source_problems(receipt, rows, source, report)
        except (PipelineError, OSError, ValueError) as error:
            yield f"its source cannot be read: {error}"


def _object_problems(stored: StoredObject, path: Path) -> Iterator[str]:
    found = describe_file(stored.path, path)
    for name in ("size", "sha256"):
        if getattr(found, name) != getattr(stored, name):
            yield f"{stored.path}: {name} is {getattr(found, name)}, its receipt says {getattr(stored, name)}"


def _content_problems(
    run: RunFile, receipt: ShardReceipt, payload: Path, index_rows: Sequence[IndexRow], report: VerifyReport
) -> Iterator[str]:
    shard_format, spec = FORMATS[run.format], spec_from_dict(run.identity.vae)
    statistics = ChannelStatistics()
    previous: tuple[str, str] | None = None
    count = 0
    with payload.open("rb") as file, payload.open("rb") as direct:
        header = shard_format.read_header(file)
        if header.fingerprint != run.fingerprint or header.shard_id != receipt.shard_id:
            yield f"its header says shard {header.shard_id} of identity {header.fingerprint}"
        file.seek(0)
        for count, latent in enumerate(shard_format.read(file), start=1):
            row = latent.row
            if count > len(index_rows) or index_rows[count - 1].row != row:
                yield f"{row.key}: its index row is missing or differs"
                break
            if previous is not None and row.sort_key <= previous:
                yield f"{row.key}: out of order or twice"
            previous = row.sort_key
            yield from _latent_problems(run, spec, latent)
            yield from _offset_problems(latent, index_rows[count - 1], direct)
            statistics = statistics.merge(ChannelStatistics.of(latent.mean_CTHW))
    report.windows += count
    if not count == len(index_rows) == receipt.counts.windows_stored:
        yield (
            f"{count} windows in the payload, {len(index_rows)} in the index, "
            f"{receipt.counts.windows_stored} in the receipt"
        )
    if statistics != receipt.statistics:
        yield "its statistics are not those of its latents"
    rows = [index_row.row for index_row in index_rows]
    expected = {
        "buckets": rows_per_bucket(rows),
        "decoders": rows_per_decoder(rows),
        "counts": receipt.counts.model_copy(
            update={
                "frames_stored": sum(row.num_frames for row in rows),
                "frames_padded": sum(row.padded_frames for row in rows),
                "clips_rejected": sum(rejection.scope == "clip" for rejection in receipt.rejections),
                "windows_rejected": sum(rejection.scope == "window" for rejection in receipt.rejections),
            }
        ),
    }
    for name, value in expected.items():
        if getattr(receipt, name) != value:
            yield f"the {name} in its receipt are not what its index and rejections add up to"


def _latent_problems(run: RunFile, spec: VAESpec, latent: Latent) -> Iterator[str]:
    row = latent.row
    try:
        expected = spec.latent_shape(row.num_frames, row.height, row.width)
    except ValueError as error:
        yield f"{row.key}: no latent of the VAE has its shape: {error}"
        return
    tensors = [(latent.mean_CTHW, run.identity.storage_dtype)]
    if latent.logvar_CTHW is not None:
        tensors.append((latent.logvar_CTHW, run.identity.logvar_dtype))
    if len(tensors) != 1 + bool(run.identity.logvar):
        yield f"{row.key}: logvar is {'missing' if run.identity.logvar else 'there but not expected'}"
    for tensor, dtype in tensors:
        if tuple(tensor.shape) != expected or tensor.dtype != STORED_DTYPES[dtype]:
            wanted = f"{expected} {dtype}"
            yield f"{row.key}: expected {wanted}, got {tuple(tensor.shape)} {tensor.dtype}"
        if not bool(torch.isfinite(tensor).all()):
            yield f"{row.key}: holds NaN or Inf"
    if len(row.frame_times) != row.num_frames or len(row.frame_indices) != row.num_frames:
        yield f"{row.key}: {len(row.frame_times)} frame times for {row.num_frames} frames"


def _offset_problems(latent: Latent, index_row: IndexRow, file: object) -> Iterator[str]:
    """A range read at the index's offset must give the same numbers."""
    if index_row.latent_offset is None:
        return
    file.seek(index_row.latent_offset)  # type: ignore[attr-defined]
    tensor = read_payload(file.read(index_row.latent_length))  # type: ignore[attr-defined]
    if not torch.equal(tensor, latent.mean_CTHW):
        yield f"{latent.row.key}: the index's offset leads to other numbers"


def _source_problems(
    receipt: ShardReceipt, rows: Sequence[IndexRow], spec: SourceSpec, report: VerifyReport
) -> Iterator[str]:
    """Every stored window's clip must be in the source with the same hash; every sample must be accounted for."""
    expected = {index_row.row.clip_key: index_row.row.pair_sha256 for index_row in rows}
    rejected = {rejection.key for rejection in receipt.rejections if rejection.scope == "clip"}
    digest, samples = SourceDigest(), 0
    for sample in read_shard(recorded_shard(receipt), spec, max_clip_bytes=1 << 62, digest=digest):
        samples += not (not isinstance(sample, Clip) and sample.scope == "shard")
        if isinstance(sample, Clip):
            report.source_clips += 1
            with sample.video:
                found = sample.pair_sha256
            if expected.pop(sample.key, found) != found:
                yield f"{sample.key}: its latent belongs to another video or caption"
    for key in expected:
        if key not in rejected:
            yield f"{key}: its latent has no clip in the source"
    if digest.sha256 is not None and digest.sha256 != receipt.source.sha256:
        yield f"{receipt.source.url} has sha256 {digest.sha256}, its receipt says {receipt.source.sha256}"
    if samples != receipt.counts.samples:
        yield f"{samples} samples, the receipt accounts for {receipt.counts.samples}"
