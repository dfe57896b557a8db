"""A dataset directory: one identity, receipts written once, a changed source named."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import (
    DatasetFolder,
    describe_file,
    describe_stored,
    index_name,
    receipt_name,
    require_unchanged,
    shard_name,
)
from pipeline.documents import Counts, ShardReceipt, StoredObject
from pipeline.errors import DatasetError, IdentityMismatch, SourceChanged, StorageError
from pipeline.manifest import build_manifest
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.records import VideoShard
from pipeline.storage import Store
from tests.pipeline.example_documents import identity, receipt, run_file
from tests.s3_server import S3Server


def commit(folder: DatasetFolder, one: ShardReceipt) -> ShardReceipt:
    """Commit a receipt whose objects are there."""
    for stored in (one.payload, one.index):
        folder.store.create(stored.path, bytes(stored.size))
    return folder.commit(one)


@pytest.fixture
def folder(tmp_path: Path) -> DatasetFolder:
    return DatasetFolder(Store(str(tmp_path / "out")))


def named_fields(error: IdentityMismatch) -> list[str]:
    return [line.strip().partition(": ")[0] for line in str(error).splitlines()[1:-1]]


# run.json


def test_claiming_twice(folder: DatasetFolder) -> None:
    first = run_file()
    assert folder.claim(first) == first
    again = run_file(config={"another": "cluster section"}, source=first.source | {"urls": ["s3://moved/*.tar"]})
    assert folder.claim(again) == first, "the run.json that stands is the one that counts"
    assert folder.run_file() == first


def other(**changes: Any) -> dict[str, Any]:
    one = identity(**changes)
    return {"identity": one, "fingerprint": one.fingerprint}


MISMATCHES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "weights": (other(weights_sha256="00" * 32), ["weights_sha256"]),
    "window length": (other(windows=WindowPolicy(frames=33)), ["windows.frames"]),
    "two at once": (
        other(windows=WindowPolicy(frames=33, tail="pad"), storage_dtype="bfloat16"),
        ["storage_dtype", "windows.frames", "windows.tail"],
    ),
    "buckets": (other(resize=ResizePolicy(buckets=((64, 64),))), ["resize.buckets"]),
    "decoders": (other(decode_backends=("pyav",)), ["decode_backends"]),
    "vae field": (other(vae=identity().vae | {"shift_factor": 0.5}), ["vae.shift_factor"]),
    "vae field added": (other(vae=identity().vae | {"new": None}), ["vae.new"]),
    "format": ({"format": "parquet"}, ["output.format"]),
    "table": ({"source": run_file().source | {"table_sha256": "aa"}}, ["source.table_sha256"]),
    "rows per shard": ({"source": run_file().source | {"rows_per_shard": 5}}, ["source.rows_per_shard"]),
    "kind of source": ({"source": run_file().source | {"kind": "table"}}, ["source.kind"]),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_another_identity_is_refused_by_the_fields_that_differ(folder: DatasetFolder, name: str) -> None:
    changes, fields = MISMATCHES[name]
    folder.claim(run_file())
    with pytest.raises(IdentityMismatch, match="belongs to another run") as caught:
        folder.claim(run_file(**changes))
    assert named_fields(caught.value) == fields
    assert folder.run_file() == run_file()


def test_the_difference_is_told(folder: DatasetFolder) -> None:
    folder.claim(run_file())
    with pytest.raises(IdentityMismatch, match=r"windows\.frames: the directory has 17, this run has 33"):
        folder.claim(run_file(**other(windows=WindowPolicy(frames=33))))


def test_two_drivers_claim_at_once(tmp_path: Path) -> None:
    """One identity wins; the other driver is told; both may not believe that it is theirs."""
    claims = [run_file(**other(windows=WindowPolicy(frames=1 + 4 * number))) for number in range(8)]
    start = threading.Barrier(len(claims))

    def claim(one: Any) -> bool:
        start.wait()
        try:
            return DatasetFolder(Store(str(tmp_path))).claim(one) == one
        except IdentityMismatch:
            return False

    with ThreadPoolExecutor(len(claims)) as pool:
        assert list(pool.map(claim, claims)).count(True) == 1


def test_a_store_that_cannot_promise_is_refused_before_anything_is_written() -> None:
    folder = DatasetFolder(Store("memory://unpromised"))
    with pytest.raises(StorageError, match="single_driver"):
        folder.claim(run_file())
    assert folder.store.info("run.json") is None


def test_a_folder_that_is_no_dataset(folder: DatasetFolder) -> None:
    for read in (folder.run_file, folder.manifest):
        with pytest.raises(DatasetError, match=r"out/(run|manifest)\.json does not exist"):
            read()
    with pytest.raises(DatasetError, match=r"receipts/00000\.json does not exist"):
        folder.receipt("00000")
    assert folder.receipt_ids() == []


def test_on_s3(s3_server: S3Server) -> None:
    """The same protocol on a store with conditional writes."""
    folder = DatasetFolder(Store(f"{s3_server.url}/dataset", options=s3_server.options))
    assert folder.claim(run_file()) == folder.claim(run_file()) == run_file()
    with pytest.raises(IdentityMismatch):
        folder.claim(run_file(format="parquet"))
    assert commit(folder, receipt()) == commit(folder, receipt()) == receipt()
    assert folder.receipt_ids() == ["00000"]


# Receipts


def test_a_receipt_is_written_once(folder: DatasetFolder) -> None:
    first = receipt()
    assert commit(folder, first) == first
    later = receipt(numerics={"device": "another"}, counts=Counts(samples=4, clips_rejected=4))
    assert commit(folder, later) == first, "the one that stands is reported"
    assert folder.receipt("00000") == first
    assert folder.store.read_bytes(receipt_name("00000")) == first.to_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"payload": StoredObject(path="shards/00000.tar", size=100, sha256="00" * 32)},
        {"fingerprint": "00" * 32},
    ],
)
def test_a_standing_receipt_of_something_else_is_an_error(folder: DatasetFolder, changes: dict[str, Any]) -> None:
    commit(folder, receipt())
    with pytest.raises(DatasetError, match=r"receipts/00000\.json: another receipt stands"):
        commit(folder, receipt(**changes))
    assert folder.receipt("00000") == receipt()


def test_many_receipts_come_in_the_order_asked_for(folder: DatasetFolder) -> None:
    ids = [f"{number:05d}" for number in range(50)]
    for name in reversed(ids):
        commit(folder, receipt(name))
    assert folder.receipt_ids() == ids
    assert [one.shard_id for one in folder.receipts(reversed(ids))] == ids[::-1]


def test_a_damaged_receipt_names_itself(folder: DatasetFolder) -> None:
    commit(folder, receipt())
    folder.store.replace(receipt_name("00001"), b"{")
    with pytest.raises(DatasetError, match=r"receipts/00001\.json: not JSON"):
        list(folder.receipts(["00000", "00001"]))


def test_the_manifest_comes_last(folder: DatasetFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = build_manifest(run_file(), [receipt()], [])
    written: list[str] = []
    replace = Store.replace
    monkeypatch.setattr(Store, "replace", lambda self, name, data: (written.append(name), replace(self, name, data)))
    folder.finish(manifest, "card")
    assert written == ["README.md", "manifest.json"]
    assert folder.manifest() == manifest
    assert folder.store.read_bytes("README.md") == b"card"


def test_run_reports_do_not_touch_the_documents(folder: DatasetFolder) -> None:
    folder.write_run_report("20260101", {"wall_seconds": 1.5})
    assert list(folder.store.names("runs", ".json")) == ["20260101.json"]


# The source behind a receipt


def shard_of(one: ShardReceipt, **changes: Any) -> VideoShard:
    fields: dict[str, Any] = {"id": one.shard_id, "kind": "webdataset", "url": one.source.url}
    return VideoShard(**fields | {"size": one.source.size, "etag": one.source.etag} | changes)


@pytest.mark.parametrize("changes", [{}, {"size": None}, {"etag": None}, {"url": "s3://moved/00000.tar"}])
def test_an_unchanged_source_passes(changes: dict[str, Any]) -> None:
    require_unchanged(shard_of(receipt(), **changes), receipt())


@pytest.mark.parametrize(
    ("changes", "message"), [({"size": 1}, "its size was 10240"), ({"etag": "x"}, "its etag was 'abc-2'")]
)
def test_a_changed_source_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceChanged, match=rf"s3://bucket/00000\.tar: {message}"):
        require_unchanged(shard_of(receipt(), **changes), receipt())


# Objects


def test_describing_a_file_and_an_object_is_the_same(folder: DatasetFolder, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 3_000_000)
    name = shard_name("00000", ".tar")
    assert folder.store.create(name, path)
    described = describe_file(name, path)
    assert described == describe_stored(folder.store, name)
    assert described == StoredObject(path=name, size=3_000_000, sha256=hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(FileNotFoundError):
        describe_stored(folder.store, index_name("00000"))


def test_a_receipt_of_objects_the_driver_cannot_see_is_refused(folder: DatasetFolder) -> None:
    """Encoders on other nodes that wrote to disks of their own."""
    with pytest.raises(DatasetError, match=r"the driver finds nothing .*storage that all nodes share"):
        folder.commit(receipt())
    folder.store.create("shards/00000.tar", bytes(7))
    with pytest.raises(DatasetError, match=r"stored 100 bytes as shards/00000.tar, the driver finds 7"):
        folder.commit(receipt())
    assert folder.receipt_ids() == []
