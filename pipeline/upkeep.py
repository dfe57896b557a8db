"""Committed shards taken back so that the next run encodes them again; objects that no receipt names.

A shard is taken back only when it is certain that it can be made again: the same VAE, the same settings, the source
as it was. Then the manifest goes first (what is left is an unfinished dataset, which readers refuse), the receipt
next (the shard is not committed any more), its index and payload last. Killed anywhere in between, the encode job
still knows what to do: it encodes what has no receipt.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.checkpoints import load_source
from pipeline.compare import NumberDifference, side_by_side
from pipeline.dataset import (
    MANIFEST,
    DatasetFolder,
    index_name,
    leaf_differences,
    receipt_name,
    require_unchanged,
    shard_name,
)
from pipeline.documents import ShardReceipt, canonical_json
from pipeline.errors import ConfigError, DatasetError, IdentityMismatch, RejectionClass, SourceError
from pipeline.formats import FORMATS
from pipeline.local_files import STAGING
from pipeline.records import Latent
from pipeline.run import EncodeSettings, identity_of
from pipeline.sources import plan_source

RECORDS = "upkeep"
"""Folder of a dataset: what was repaired and tried again, a JSON document each time."""


def require_repeatable(
    dataset: DatasetFolder, settings: EncodeSettings, shard_ids: Collection[str]
) -> frozenset[str]:
    """Check that these shards can be encoded again and would be the same; nothing is changed. Returns the ids of all
    shards of the source.

    IdentityMismatch if VAE or settings are others now, SourceError if a shard's source is gone, SourceChanged if it
    is not what it was.
    """
    run = dataset.run_file()
    identity = identity_of(settings, load_source(settings.vae))
    names = ("the dataset", "encoding again")
    lines = list(
        leaf_differences("", run.identity.model_dump(mode="json"), identity.model_dump(mode="json"), names=names)
    )
    if lines:
        raise IdentityMismatch("nothing was changed: the shards would not be the same:\n  " + "\n  ".join(lines))
    shards = {shard.id: shard for shard in plan_source(settings.source).shards}
    gone = sorted(set(shard_ids) - shards.keys())
    if gone:
        raise SourceError(f"nothing was changed: the source has no shard {', '.join(gone[:5])} any more")
    for shard_id, receipt in readable_receipts(dataset, shard_ids).items():
        require_unchanged(shards[shard_id], receipt)
    return frozenset(shards)


def readable_receipts(dataset: DatasetFolder, shard_ids: Collection[str]) -> dict[str, ShardReceipt]:
    """The receipts of those shards that have a whole one."""
    receipts: dict[str, ShardReceipt] = {}
    for shard_id in sorted(shard_ids):
        try:
            receipts[shard_id] = dataset.receipt(shard_id)
        except DatasetError:
            continue
    return receipts


def take_back(dataset: DatasetFolder, shard_ids: Collection[str]) -> None:
    """Make these shards uncommitted and remove what they stored. The manifest goes too: the next run writes it."""
    suffix = FORMATS[dataset.run_file().format].suffix
    dataset.store.remove(MANIFEST)
    for shard_id in sorted(shard_ids):
        for name in (receipt_name(shard_id), index_name(shard_id), shard_name(shard_id, suffix)):
            dataset.store.remove(name)


def unnamed_objects(dataset: DatasetFolder) -> Iterator[tuple[str, int | None]]:
    """(name, bytes) of what lies in shards/ and index/ and belongs to no receipt, and of what killed writers of a
    local store left half written."""
    ids, suffix = dataset.receipt_ids(), FORMATS[dataset.run_file().format].suffix
    known = {
        "shards": {f"{one}{suffix}" for one in ids},
        "index": {f"{one}.parquet" for one in ids},
        STAGING: set[str](),
    }
    for folder, names in known.items():
        for name in dataset.store.names(folder, ""):
            if name not in names:
                found = dataset.store.info(f"{folder}/{name}")
                yield f"{folder}/{name}", found.size if found else None


def unnamed_shards(dataset: DatasetFolder) -> set[str]:
    """Ids of shards that have a payload or an index but no receipt."""
    return {Path(name).stem for name, _ in unnamed_objects(dataset) if not name.startswith(STAGING)}


def require_finished(dataset: DatasetFolder) -> None:
    """DatasetError unless the dataset has its manifest: what no receipt names may be of a run under way."""
    if dataset.store.info(MANIFEST) is None:
        raise DatasetError(
            f"{dataset.store.full_url('')} is unfinished, and what no receipt names yet may belong to a run that "
            "is under way. Finish it first: start the encode job again."
        )


def shards_with_rejections(dataset: DatasetFolder, classes: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Keys of the rejections of these classes by shard. ConfigError for a class that there is not."""
    known = [one.value for one in RejectionClass]
    unknown = sorted(set(classes) - set(known))
    if unknown or not classes:
        raise ConfigError(f"--class: expected of {', '.join(known)}, got {', '.join(unknown) or 'none'}")
    found: dict[str, tuple[str, ...]] = {}
    for receipt in dataset.receipts(dataset.receipt_ids()):
        keys = tuple(one.key for one in receipt.rejections if one.error_class in classes)
        if keys:
            found[receipt.shard_id] = keys
    return found


@dataclass(slots=True)
class RowChanges:
    """What encoding shards again changed in the windows that they held before."""

    lost: list[str] = field(default_factory=list)
    gained: list[str] = field(default_factory=list)
    numbers: NumberDifference = field(default_factory=NumberDifference)


class KeptShards:
    """Copies of payloads, in a local folder, to compare with what is encoded in their place."""

    def __init__(self, dataset: DatasetFolder, folder: Path) -> None:
        self._dataset = dataset
        self._folder = folder
        self._format = FORMATS[dataset.run_file().format]
        self._files: dict[str, Path] = {}

    def keep(self, receipts: Mapping[str, ShardReceipt]) -> None:
        """Copy the payloads; DatasetError if one is gone (then repair first)."""
        for shard_id, receipt in receipts.items():
            target = self._folder / f"{shard_id}{self._format.suffix}"
            with self._dataset.open_seekable(receipt.payload.path) as stored, target.open("wb") as copy:
                shutil.copyfileobj(stored, copy)
            self._files[shard_id] = target

    def changes(self) -> RowChanges:
        """The copies against the shards that stand now."""
        changes = RowChanges()
        for shard_id, path in self._files.items():
            receipt = self._dataset.receipt(shard_id)
            with path.open("rb") as before, self._dataset.open_seekable(receipt.payload.path) as now:
                for pair in side_by_side(self._format.read(before), self._format.read(now)):
                    _note(pair, changes)
        return changes


def _note(pair: tuple[Latent | None, Latent | None], changes: RowChanges) -> None:
    match pair:
        case (Latent() as before, None):
            changes.lost.append(before.row.key)
        case (None, Latent() as now):
            changes.gained.append(now.row.key)
        case (Latent() as before, Latent() as now):
            changes.numbers.add(now.row.key, before.mean_CTHW, now.mean_CTHW)


def lost_windows(before: Mapping[str, ShardReceipt], after: Mapping[str, ShardReceipt]) -> list[str]:
    """A line for each shard that stores fewer windows than it did; receipts by shard id."""
    lines: list[str] = []
    for shard_id in sorted(before.keys() & after.keys()):
        then, now = (receipts[shard_id].counts.windows_stored for receipts in (before, after))
        if now < then:
            lines.append(f"shard {shard_id}: {then} windows then, {now} now")
    return lines


def changed_numerics(before: Mapping[str, ShardReceipt], after: Mapping[str, ShardReceipt]) -> list[str]:
    """What decides last bits and was another when the shards were first encoded: where it differs, so may bytes."""
    lines = {
        line
        for shard_id in sorted(before.keys() & after.keys())
        for line in leaf_differences("", before[shard_id].numerics, after[shard_id].numerics, names=("then", "now"))
    }
    return sorted(lines)


def retried_settings(dataset: DatasetFolder) -> list[str]:
    """What retries have set of decode.*, as overrides in the order of time. Shards that are encoded again need it, or
    they would lose the clips that the retries gained. DatasetError for a record that is none."""
    found: list[str] = []
    for name in sorted(dataset.store.names(RECORDS, ".json")):
        try:
            record = json.loads(dataset.store.read_bytes(f"{RECORDS}/{name}"))
            overrides = record["overrides"] if record["verb"] == "retry" else []
            found += [one for one in overrides if one.startswith("decode.")]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            where = dataset.store.full_url(f"{RECORDS}/{name}")
            raise DatasetError(f"{where}: not the record of a repair or a retry: {error!r}") from error
    return found


def write_record(dataset: DatasetFolder, record: dict[str, Any]) -> str:
    """Keep what was done in a document of its own: a receipt says nothing of attempts. Returns its name."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    name = f"{RECORDS}/{stamp}-{uuid.uuid4().hex[:6]}.json"
    dataset.store.replace(name, canonical_json({"unix_time": round(time.time(), 3), **record}))
    return name
