"""Export a dataset, a shard at a time: resumable, nothing twice, checked on the way.

TARGET/BUCKET/...              the format's files; a bucket's rows are in the order of the shards
TARGET/export/settings.json    created first, only if absent: the target belongs to one dataset, format and choice
TARGET/export/shards/ID.json   a shard is exported: what it was read from, what it became; written after its files
TARGET/export/done.json        written last: totals

A shard's files are a function of the shard, so whoever was killed is simply done again: what is there with the right
sha256 stays. Each shard's bytes are compared with the manifest before they are read, what was written is read back
and compared with the shard, number by number, and what is stored is read once more for its sha256.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pipeline.dataset import MANIFEST, RUN_FILE, DatasetFolder, describe_file, describe_stored, shard_name
from pipeline.documents import Document, Manifest, ManifestShard
from pipeline.errors import ConfigError, DatasetError, IdentityMismatch
from pipeline.export.contract import ExportedFile, ExportFormat, ReadBack, WrittenFile
from pipeline.export.fastvideo import FastVideoExport
from pipeline.export.mds import MDSExport
from pipeline.formats import FORMATS
from pipeline.records import Latent
from pipeline.storage import Store

EXPORTS: dict[str, ExportFormat] = {"fastvideo": FastVideoExport(), "mds": MDSExport()}
SETTINGS, DONE = "export/settings.json", "export/done.json"
RECEIPT_READERS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSettings:
    """What to export."""

    format: str
    with_logvar: bool = True
    """Log variances too, where the dataset stores them."""
    part: tuple[int, int] = (1, 1)
    """(i, n): every n-th shard from the i-th on, so that n machines share a dataset."""


class TargetFile(Document):
    """TARGET/export/settings.json."""

    format_version: int = 1
    format: str
    fingerprint: str
    logvar: bool
    latents: str = "raw"
    """Not shifted, not scaled."""
    vae: dict[str, object]


class ExportReceipt(Document):
    """TARGET/export/shards/ID.json."""

    format_version: int = 1
    shard_id: str
    source_sha256: str
    rows: int
    files: tuple[ExportedFile, ...]


@dataclass(slots=True)
class ExportReport:
    """What a run did. `finished`: all shards of the dataset are in the target, whoever exported them."""

    shards: int = 0
    windows: int = 0
    bytes: int = 0
    shards_found_done: int = 0
    finished: bool = False


def export_dataset(
    source: Store, target: Store, settings: ExportSettings, *, on_shard: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Export what is not exported yet. Calls `on_shard(done, total)` as it goes.

    ConfigError for what the format cannot hold or a target that is a dataset; IdentityMismatch if the target belongs
    to another export; DatasetError if the dataset is unfinished or a shard is not what the manifest says.
    """
    if settings.format not in EXPORTS:
        raise ConfigError(f"format: expected one of {sorted(EXPORTS)}, got {settings.format!r}")
    part, parts = settings.part
    if not 1 <= part <= parts:
        raise ConfigError(f"part: expected I/N with 1 <= I <= N, got {part}/{parts}")
    if target.info(RUN_FILE) is not None or target.info(MANIFEST) is not None:
        raise ConfigError(f"{target.full_url('')}: a dataset of latents: expected a folder of its own for the export")
    manifest = DatasetFolder(source).manifest()
    EXPORTS[settings.format].check(manifest.identity, with_logvar=settings.with_logvar)
    _claim(target, manifest, settings)
    done = _exported(target, manifest)
    shards = manifest.shards[part - 1 :: parts]
    report = ExportReport(shards_found_done=sum(shard.id in done for shard in shards))
    for number, shard in enumerate(shards):
        if on_shard is not None:
            on_shard(number, len(shards))
        if shard.id in done:
            continue
        receipt = _export_shard(source, target, manifest, shard, settings)
        done[shard.id] = receipt
        report.shards += 1
        report.windows += receipt.rows
        report.bytes += sum(file.size for file in receipt.files)
    if on_shard is not None:
        on_shard(len(shards), len(shards))
    if parts > 1:  # the others may have come to an end meanwhile
        done = _exported(target, manifest)
    report.finished = len(done) == len(manifest.shards)
    if report.finished:
        _finish(target, manifest, [done[shard.id] for shard in manifest.shards], settings)
    return report


def _claim(target: Store, manifest: Manifest, settings: ExportSettings) -> None:
    target.require_conditional_writes()
    wanted = TargetFile(
        format=settings.format,
        fingerprint=manifest.fingerprint,
        logvar=manifest.identity.logvar and settings.with_logvar,
        vae=dict(manifest.identity.vae),
    )
    if target.create(SETTINGS, wanted.to_bytes()):
        return
    standing = TargetFile.from_bytes(target.read_bytes(SETTINGS), target.full_url(SETTINGS))
    names = [name for name in TargetFile.model_fields if getattr(standing, name) != getattr(wanted, name)]
    if names:
        differences = "; ".join(
            f"{name}: there {getattr(standing, name)!r}, asked for {getattr(wanted, name)!r}" for name in names
        )
        raise IdentityMismatch(f"{target.full_url('')} belongs to another export: {differences}")


def _exported(target: Store, manifest: Manifest) -> dict[str, ExportReceipt]:
    """The receipts of the shards that are exported. DatasetError if one was made from another shard than is there."""
    there = set(target.names("export/shards", ".json"))
    shards = [shard for shard in manifest.shards if f"{shard.id}.json" in there]

    def read(shard: ManifestShard) -> ExportReceipt:
        name = _receipt_name(shard.id)
        receipt = ExportReceipt.from_bytes(target.read_bytes(name), target.full_url(name))
        if receipt.source_sha256 != shard.sha256:
            raise DatasetError(
                f"{target.full_url(name)}: exported from a shard with sha256 {receipt.source_sha256}, the dataset's "
                f"is {shard.sha256}: it was encoded anew. Delete this file and what it names, and start again"
            )
        return receipt

    with ThreadPoolExecutor(RECEIPT_READERS) as pool:
        return {shard.id: receipt for shard, receipt in zip(shards, pool.map(read, shards))}


def _receipt_name(shard_id: str) -> str:
    return f"export/shards/{shard_id}.json"


def _export_shard(
    source: Store, target: Store, manifest: Manifest, shard: ManifestShard, settings: ExportSettings
) -> ExportReceipt:
    export, shard_format = EXPORTS[settings.format], FORMATS[manifest.format]
    name = shard_name(shard.id, shard_format.suffix)
    with tempfile.TemporaryDirectory(prefix="latents-export-") as scratch:
        path = _fetched(source, name, shard, Path(scratch))

        def latents() -> Iterator[Latent]:
            with path.open("rb") as file:
                for latent in shard_format.read(file):
                    yield latent if settings.with_logvar else _without_logvar(latent)

        files: list[tuple[str, WrittenFile]] = []
        for bucket, some in itertools.groupby(latents(), lambda latent: latent.row.bucket):
            folder = Path(scratch) / "out" / bucket
            folder.mkdir(parents=True)
            files += [(bucket, file) for file in export.write(folder, shard.id, some)]
        rows = _compare(latents(), itertools.chain.from_iterable(export.read(file.path) for _, file in files), name)
        expected = sum(shard.rows.values())
        if not rows == expected == sum(file.rows for _, file in files):
            raise DatasetError(f"{name}: the manifest says {expected} windows, {rows} were read and written")
        stored = tuple(_stored(target, bucket, file) for bucket, file in files)
    receipt = ExportReceipt(shard_id=shard.id, source_sha256=shard.sha256, rows=rows, files=stored)
    target.create(_receipt_name(shard.id), receipt.to_bytes())
    return receipt


def _fetched(source: Store, name: str, shard: ManifestShard, scratch: Path) -> Path:
    try:
        path = source.local_file(name, scratch)
    except FileNotFoundError as error:
        raise DatasetError(f"{source.full_url(name)} does not exist") from error
    found = describe_file(name, path)
    if (found.size, found.sha256) != (shard.size, shard.sha256):
        raise DatasetError(
            f"{source.full_url(name)}: expected {shard.size} bytes with sha256 {shard.sha256}, "
            f"got {found.size} with {found.sha256}; see `latents verify`"
        )
    return path


def _without_logvar(latent: Latent) -> Latent:
    return replace(latent, row=replace(latent.row, has_logvar=False), logvar_CTHW=None)


def _compare(latents: Iterable[Latent], read: Iterable[ReadBack], where: str) -> int:
    """Number of rows. DatasetError unless what was read back is what the shard has, in its order."""
    rows = 0
    for latent, back in itertools.zip_longest(latents, read):
        if latent is None or back is None or (latent.row.key, latent.row.caption) != (back.key, back.caption):
            expected, got = latent and latent.row.key, back and back.key
            raise DatasetError(f"{where}: row {rows} of the export: expected {expected}, got {got}, or its caption")
        for stored, exported in ((latent.mean_CTHW, back.mean_CTHW), (latent.logvar_CTHW, back.logvar_CTHW)):
            same = stored is exported is None or (
                stored is not None and exported is not None and torch.equal(stored.to(exported.dtype), exported)
            )
            if not same:
                raise DatasetError(f"{where}: {back.key}: the export has other numbers than the shard")
        rows += 1
    return rows


def _stored(target: Store, bucket: str, file: WrittenFile) -> ExportedFile:
    """The file in its place. What is there already must be the same: left by an attempt that did not end."""
    name = f"{bucket}/{file.path.name}"
    wanted = describe_file(name, file.path)
    target.create(name, file.path)
    found = describe_stored(target, name)
    if found != wanted:
        raise DatasetError(
            f"{target.full_url(name)}: expected {wanted.size} bytes with sha256 {wanted.sha256}, found {found.size} "
            f"with {found.sha256}: left by an export with other software, or damaged. Delete it and start again"
        )
    return ExportedFile(path=name, size=wanted.size, sha256=wanted.sha256, rows=file.rows, entry=file.entry)


def _finish(target: Store, manifest: Manifest, receipts: Sequence[ExportReceipt], settings: ExportSettings) -> None:
    export = EXPORTS[settings.format]
    buckets: dict[str, list[ExportedFile]] = {}
    for receipt in receipts:
        for file in receipt.files:
            buckets.setdefault(file.path.split("/", 1)[0], []).append(file)
    rows = {bucket: sum(file.rows for file in files) for bucket, files in sorted(buckets.items())}
    if rows != manifest.buckets:
        raise DatasetError(f"{target.full_url('')}: expected windows {manifest.buckets}, exported {rows}")
    for bucket, files in buckets.items():
        gone = {file.path for file in files} - {f"{bucket}/{name}" for name in target.names(bucket, "")}
        if gone:
            raise DatasetError(
                f"{target.full_url('')}: exported before and gone now: {', '.join(sorted(gone)[:5])}. Delete the "
                "file of their shard in export/shards/ and start again"
            )
        for name, content in export.index(files).items():
            target.replace(f"{bucket}/{name}", content)
    target.replace(DONE, _Done(buckets=rows, shards=len(receipts)).to_bytes())


class _Done(Document):
    """TARGET/export/done.json."""

    format_version: int = 1
    shards: int
    buckets: dict[str, int]
