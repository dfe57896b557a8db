"""A dataset directory: its layout, who may write into it, and what makes a shard committed.

OUT/run.json                     created first, only if absent: the directory belongs to one identity
OUT/shards/ID.tar|.parquet       payload: the first whole object wins
OUT/index/ID.parquet             one row per window, no payload; apart, so that shards/ is all payload
OUT/receipts/ID.json             the commit: written once, after the objects it describes
OUT/runs/RUN.json                times, rates, hosts: what may differ between runs
OUT/runs/PACK.receipts           copies of receipts, for planning on an object store (receipt_packs.py)
OUT/upkeep/ID.json               what was repaired or tried again (upkeep.py)
OUT/manifest.json, README.md     written last
"""

from __future__ import annotations

import hashlib
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.documents import (
    FORMAT_VERSION,
    Counts,
    Manifest,
    RunFile,
    ShardReceipt,
    SourceRecord,
    StoredObject,
    canonical_json,
)
from pipeline.errors import DatasetError, IdentityMismatch, SourceChanged
from pipeline.receipt_packs import PackedReceipts, ReceiptPacks, is_etag_of
from pipeline.records import VideoShard
from pipeline.storage import Store

RUN_FILE = "run.json"
MANIFEST = "manifest.json"
CARD = "README.md"
SOURCE_PLACES = ("urls", "url", "root", "options")
RECEIPT_READERS = 32
RECEIPTS_AT_ONCE = 16
_CHUNK = 1 << 20
Read = TypeVar("Read")


def shard_name(shard_id: str, suffix: str) -> str:
    return f"shards/{shard_id}{suffix}"


def index_name(shard_id: str) -> str:
    return f"index/{shard_id}.parquet"


def receipt_name(shard_id: str) -> str:
    return f"receipts/{shard_id}.json"


class ReceiptHead(BaseModel):
    """What planning must know of a receipt; the rest of it is not looked at."""

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = FORMAT_VERSION
    shard_id: str
    fingerprint: str
    source: SourceRecord


class ReceiptSummary(BaseModel):
    """What the totals of a run in progress are made of; the rest of a receipt is not looked at."""

    class _Class(BaseModel):
        error_class: str

    class _Proof(BaseModel):
        windows_out_of_memory: int = 0

    model_config = ConfigDict(frozen=True)

    format_version: Literal[1] = FORMAT_VERSION
    shard_id: str
    counts: Counts
    rejections: tuple[_Class, ...]
    payload: StoredObject
    tile_proof: _Proof | None = None


class DatasetFolder:
    """The documents of a dataset in a store."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.packs = ReceiptPacks(store)

    def claim(self, run: RunFile) -> RunFile:
        """Create run.json, or check the one that is there. IdentityMismatch names every field that differs.

        Returns the run.json that stands, which may have been written by an earlier run.
        """
        self.store.require_conditional_writes()
        if self.store.create(RUN_FILE, run.to_bytes()):
            self.store.info(RUN_FILE)  # a right to read that is missing shows now, not at the first commit
            return run
        standing = self.run_file()
        differences = list(_differences(standing, run))
        if differences:
            lines = "\n  ".join(differences)
            way_out = "Choose another output.url, or make the config as it was."
            if not self.receipt_ids():
                way_out += " It holds no committed shard yet, so deleting it loses nothing."
            raise IdentityMismatch(
                f"{self.store.full_url('')} belongs to another run (one directory holds one identity).\n  {lines}\n"
                f"{way_out}"
            )
        return standing

    def run_file(self) -> RunFile:
        """run.json; DatasetError if this is no dataset directory."""
        return RunFile.from_bytes(self._read(RUN_FILE), self.store.full_url(RUN_FILE))

    def manifest(self) -> Manifest:
        """manifest.json; DatasetError if the dataset is unfinished."""
        return Manifest.from_bytes(self._read(MANIFEST), self.store.full_url(MANIFEST))

    def receipt(self, shard_id: str) -> ShardReceipt:
        return self._parse(shard_id, self._read(receipt_name(shard_id)))

    def committed(self) -> dict[str, str | None]:
        """The ETag of each committed shard's receipt by shard id, sorted: one listing of receipts/."""
        return {name.removesuffix(".json"): etag for name, etag in self.store.etags("receipts", ".json").items()}

    def receipt_ids(self) -> list[str]:
        """Ids of the committed shards, sorted."""
        return list(self.committed())

    def receipts(self, shard_ids: Iterable[str], packed: PackedReceipts | None = None) -> Iterator[ShardReceipt]:
        """Receipts in the given order, read a few hundred ahead by several threads; `packed` ones are not read."""

        def read(shard_id: str) -> ShardReceipt:
            content = packed.get(shard_id) if packed else None
            return self.receipt(shard_id) if content is None else self._parse(shard_id, content)

        return _read_ahead(read, shard_ids)

    def receipt_heads(self, committed: Mapping[str, str | None]) -> Iterator[ReceiptHead]:
        """The heads of all receipts, in the order of `committed`. Those that were read by themselves are packed, so
        that the next planning need not."""
        packed = self.packs.load(committed)

        def read(shard_id: str) -> ReceiptHead:
            content = packed.get(shard_id)
            if content is None:
                content = self._read(receipt_name(shard_id))
                if is_etag_of(committed[shard_id], content):
                    self.packs.add(content)
            try:
                return ReceiptHead.model_validate_json(content)
            except ValidationError:  # the whole receipt says better what is wrong with it
                return ReceiptHead.model_validate(self._parse(shard_id, content).model_dump())

        yield from _read_ahead(read, committed)
        self.packs.flush()

    def receipt_summaries(self, committed: Mapping[str, str | None]) -> Iterator[ReceiptSummary]:
        """Summaries of receipts, in the order of `committed`; nothing is written, packs are read where they help."""
        packed = self.packs.load(committed)

        def read(shard_id: str) -> ReceiptSummary:
            content = packed.get(shard_id) or self._read(receipt_name(shard_id))
            try:
                return ReceiptSummary.model_validate_json(content)
            except ValidationError:  # the whole receipt says better what is wrong with it
                return ReceiptSummary.model_validate(self._parse(shard_id, content).model_dump())

        return _read_ahead(read, committed)

    def _parse(self, shard_id: str, content: bytes) -> ShardReceipt:
        return ShardReceipt.from_bytes(content, self.store.full_url(receipt_name(shard_id)))

    def commit(self, receipt: ShardReceipt) -> ShardReceipt:
        """Write the receipt unless the shard has one; return the one that stands.

        DatasetError if the objects it describes are not there, or a standing receipt describes others.
        """
        for stored in (receipt.payload, receipt.index):
            found = self.store.info(stored.path)
            if found is None or found.size != stored.size:
                raise DatasetError(
                    f"shard {receipt.shard_id}: its encoder stored {stored.size} bytes as {stored.path}, the driver "
                    f"finds {'nothing' if found is None else found.size} at {self.store.full_url(stored.path)}. "
                    "Is output.url on storage that all nodes share?"
                )
        content = receipt.to_bytes()
        if self.store.create(receipt_name(receipt.shard_id), content):
            self.packs.add(content)
            return receipt
        standing = self.receipt(receipt.shard_id)
        if standing.payload != receipt.payload or standing.fingerprint != receipt.fingerprint:
            raise DatasetError(
                f"{self.store.full_url(receipt_name(receipt.shard_id))}: another receipt stands and describes "
                f"{standing.payload}, but the object found is {receipt.payload}"
            )
        return standing

    def finish(self, manifest: Manifest, card: str) -> None:
        """Write the dataset card and, last, the manifest."""
        self.store.replace(CARD, card.encode())
        self.store.replace(MANIFEST, manifest.to_bytes())

    def write_run_report(self, run_id: str, report: dict[str, object]) -> None:
        self.store.replace(f"runs/{run_id}.json", canonical_json(report))

    def open_seekable(self, name: str) -> BinaryIO:
        """A seekable file of an object that a receipt names. DatasetError if it is gone."""
        try:
            return self.store.open_seekable(name)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.store.full_url(name)} does not exist: `latents verify` says more") from error

    def _read(self, name: str) -> bytes:
        try:
            return self.store.read_bytes(name)
        except FileNotFoundError as error:
            raise DatasetError(f"{self.store.full_url(name)} does not exist") from error


def _read_ahead(read: Callable[[str], Read], shard_ids: Iterable[str]) -> Iterator[Read]:
    """Results in order, computed by several threads a few hundred ahead."""
    remaining = iter(shard_ids)
    under_way: deque[Future[list[Read]]] = deque()
    with ThreadPoolExecutor(RECEIPT_READERS, thread_name_prefix="receipts") as pool:
        # a thread takes some at a time: handing over each receipt alone would cost as much as parsing it
        while some := list(itertools.islice(remaining, RECEIPTS_AT_ONCE)):
            under_way.append(pool.submit(lambda group: [read(shard_id) for shard_id in group], some))
            if len(under_way) > RECEIPT_READERS:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()


def _differences(standing: RunFile, wanted: RunFile) -> Iterator[str]:
    """One line per setting in which two run files cannot share a directory."""
    if standing.format != wanted.format:
        yield f"output.format: the directory has {standing.format!r}, this run has {wanted.format!r}"
    before, now = standing.identity.model_dump(mode="json"), wanted.identity.model_dump(mode="json")
    yield from leaf_differences("", before, now)
    # where the source lies may change; how it is cut into shards, keyed and captioned may not
    there, here = ({k: v for k, v in run.source.items() if k not in SOURCE_PLACES} for run in (standing, wanted))
    yield from leaf_differences("source", there, here)


def leaf_differences(
    prefix: str, before: object, now: object, names: tuple[str, str] = ("the directory", "this run")
) -> Iterator[str]:
    """One line per value in which two documents differ."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in sorted(before.keys() | now.keys()):
            where = f"{prefix}.{name}" if prefix else name
            yield from leaf_differences(where, before.get(name, "(absent)"), now.get(name, "(absent)"), names)
    elif before != now:
        yield f"{prefix}: {names[0]} has {before!r}, {names[1]} has {now!r}"


def require_unchanged(shard: VideoShard, receipt: ShardReceipt | ReceiptHead) -> None:
    """SourceChanged if a committed shard's source is no longer the object its receipt was made from."""
    for name in ("size", "etag"):
        before, now = getattr(receipt.source, name), getattr(shard, name)
        if before is not None and now is not None and before != now:
            raise SourceChanged(
                f"{shard.url}: its {name} was {before!r} when shard {shard.id} was committed and is {now!r} now. "
                "Encode the changed source into another output directory, or restore it."
            )


def describe_file(name: str, path: Path) -> StoredObject:
    """Size and sha256 of a local file that is to be stored under `name`."""
    with path.open("rb") as file:
        return StoredObject(
            path=name, size=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
        )


def describe_stored(store: Store, name: str) -> StoredObject:
    """Size and sha256 of an object in a store, read in one pass. FileNotFoundError if absent."""
    digest, size = hashlib.sha256(), 0
    with store.open_stream(name) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
    return StoredObject(path=name, size=size, sha256=digest.hexdigest())
