"""Receipts in packs, so that planning over many of them on an object store is not a request for each.

A pack under runs/ holds copies of some hundred receipts. Nothing depends on it: a copy stands for a receipt only if
its MD5 is the ETag that the listing of receipts/ gives, which it is on S3 for an object that was put whole and not
encrypted with a KMS key. Every other receipt is read by itself. A local disk has no ETags and needs no packs.

A pack is entries without padding: 16 bytes MD5 of the receipt, 4 bytes length (big-endian), the receipt in zlib.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from pipeline.errors import StorageError
from pipeline.storage import Store

log = logging.getLogger(__name__)

FOLDER = "runs"
SUFFIX = ".receipts"
RECEIPTS_PER_PACK = 1000
WORTH_PACKING = 100
"""Fewer receipts than this are left to be read by themselves."""
READERS = 16
_HEAD = 20


class ReceiptPacks:
    """Writes and reads the packs of one dataset. `add` may be called by many threads."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._guard = threading.Lock()
        self._waiting: list[bytes] = []

    def add(self, receipt: bytes) -> None:
        """Keep a copy of a receipt that stands; writes a pack when enough have come."""
        if self._store.is_local:
            return
        packed = zlib.compress(receipt)
        entry = hashlib.md5(receipt, usedforsecurity=False).digest() + len(packed).to_bytes(4, "big") + packed
        with self._guard:
            self._waiting.append(entry)
            if len(self._waiting) < RECEIPTS_PER_PACK:
                return
            full, self._waiting = self._waiting, []
        self._write(full)

    def flush(self) -> None:
        """Write what waits, if it is worth a pack."""
        with self._guard:
            rest, self._waiting = self._waiting, []
        if len(rest) >= WORTH_PACKING:
            self._write(rest)

    def load(self, etags: Mapping[str, str | None]) -> PackedReceipts:
        """Copies of receipts that stand, given the ETags of all by shard id."""
        by_etag = {etag: shard_id for shard_id, etag in etags.items() if etag is not None}
        copies: dict[str, bytes] = {}
        if len(by_etag) >= WORTH_PACKING:  # so never on a local disk, which has no ETags
            names = [f"{FOLDER}/{name}" for name in self._store.names(FOLDER, SUFFIX)]
            with ThreadPoolExecutor(READERS, thread_name_prefix="packs") as pool:
                for pack in pool.map(self._read, names):
                    for etag, packed in _entries(pack):
                        if etag in by_etag:
                            copies[by_etag[etag]] = packed
        return PackedReceipts(etags, copies)

    def _read(self, name: str) -> bytes:
        try:
            return self._store.read_bytes(name)
        except FileNotFoundError:  # somebody cleans up
            return b""

    def _write(self, entries: list[bytes]) -> None:
        """Named by its content: two drivers that pack the same receipts write the same object."""
        content = b"".join(sorted(entries))
        name = f"{FOLDER}/{hashlib.sha256(content).hexdigest()[:16]}{SUFFIX}"
        try:
            self._store.create(name, content)
        except StorageError as error:
            log.warning("receipts were not packed: %s", error)


class PackedReceipts:
    """Receipts by shard id, checked against their ETags as they are taken."""

    def __init__(self, etags: Mapping[str, str | None], copies: Mapping[str, bytes]) -> None:
        self._etags = etags
        self._copies = copies

    def get(self, shard_id: str) -> bytes | None:
        """The receipt's bytes; None if no pack has them whole."""
        packed = self._copies.get(shard_id)
        if packed is None:
            return None
        try:
            receipt = zlib.decompress(packed)
        except zlib.error:
            return None
        return receipt if is_etag_of(self._etags.get(shard_id), receipt) else None


def is_etag_of(etag: str | None, content: bytes) -> bool:
    """Whether an S3 store gives this ETag to this content, put whole and not encrypted with a KMS key."""
    return etag == hashlib.md5(content, usedforsecurity=False).hexdigest()


def _entries(pack: bytes) -> Iterator[tuple[str, bytes]]:
    """(MD5 in hex, zlib bytes) of each receipt; a pack that was cut ends early."""
    start = 0
    while start + _HEAD <= len(pack):
        stop = start + _HEAD + int.from_bytes(pack[start + 16 : start + _HEAD], "big")
        if stop > len(pack):
            return
        yield pack[start : start + 16].hex(), pack[start + _HEAD : stop]
        start = stop
