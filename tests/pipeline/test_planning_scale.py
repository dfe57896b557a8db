"""Planning over many receipts and committing many shards: few requests, little memory, the same answers."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import DatasetFolder, receipt_name
from pipeline.documents import ShardReceipt
from pipeline.errors import DatasetError, IdentityMismatch, PoisonShard, ShardError, SourceChanged
from pipeline.receipt_packs import RECEIPTS_PER_PACK, WORTH_PACKING
from pipeline.records import VideoShard
from pipeline.run import COMMITS_AT_ONCE, RunLog, RunPlan, _without_committed, commit_all
from pipeline.shard import ShardFailed, ShardOutcome, ShardPoisoned, ShardStored
from pipeline.storage import Store
from tests.pipeline.example_documents import receipt, run_file
from tests.s3_server import Proxy, S3Server, proxy_to

MANY = WORTH_PACKING + 30


def ids(count: int) -> list[str]:
    return [f"{number:05d}" for number in range(count)]


def shard(shard_id: str, **changes: Any) -> VideoShard:
    fields = {"kind": "webdataset", "url": f"s3://bucket/{shard_id}.tar", "size": 10240, "etag": "abc-2"}
    return VideoShard(id=shard_id, **fields | changes)


def put_receipts(store: Store, receipts: list[ShardReceipt]) -> None:
    for one in receipts:
        assert store.create(receipt_name(one.shard_id), one.to_bytes())


def left(store: Store, shards: list[VideoShard]) -> list[str]:
    """What a planning leaves to do, in a folder that remembers nothing."""
    return [one.id for one in _without_committed(DatasetFolder(store), tuple(shards), run_file())]


def test_memory_of_planning_does_not_hold_the_receipts(tmp_path: Path) -> None:
    """Measured on receipts that are large by their rejections; jobs/simulate.py resume has the figures for many."""
    store = Store(str(tmp_path / "out"))
    rejections = receipt().rejections * 300
    put_receipts(store, [receipt(shard_id, rejections=rejections) for shard_id in ids(600)])
    size = len(receipt("00000", rejections=rejections).to_bytes())
    shards = [shard(shard_id) for shard_id in ids(601)]
    left(store, shards[:1])  # imports and caches
    tracemalloc.start()
    try:
        assert left(store, shards) == ["00600"]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 600 * size / 2


def test_a_head_says_what_is_wrong_as_the_whole_receipt_does(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "out"))
    newer = receipt("00000").to_bytes().replace(b'"format_version": 1', b'"format_version": 99')
    store.create(receipt_name("00000"), newer)
    with pytest.raises(DatasetError, match=r"receipts/00000\.json: expected format_version at most 1, got 99"):
        left(store, [])
    other = Store(str(tmp_path / "other"))
    other.create(receipt_name("00000"), receipt("00000").to_bytes()[:-100])
    with pytest.raises(DatasetError, match=r"receipts/00000\.json: not JSON"):
        left(other, [])


# packs


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> Iterator[tuple[Store, Proxy]]:
    """A dataset's store seen through a proxy that counts."""
    with proxy_to(s3_server) as proxy:
        yield Store(f"{s3_server.url}/{request.node.name}", options=proxy.options), proxy


def gets(proxy: Proxy, of: str) -> int:
    return sum(head.startswith("GET ") and of in head.split()[1] for head in proxy.heads)


def test_a_second_planning_reads_packs_and_what_is_not_in_them(bucket: tuple[Store, Proxy]) -> None:
    store, proxy = bucket
    put_receipts(store, [receipt(shard_id) for shard_id in ids(MANY)])
    shards = [shard(shard_id) for shard_id in ids(MANY + 1)]
    assert left(store, shards) == [ids(MANY + 1)[-1]]
    assert (gets(proxy, "/receipts/"), gets(proxy, ".receipts")) == (MANY, 0)
    proxy.heads.clear()
    assert left(store, shards) == [ids(MANY + 1)[-1]]
    assert (gets(proxy, "/receipts/"), gets(proxy, ".receipts")) == (0, 1)

    proxy.heads.clear()
    store.replace(receipt_name("00007"), receipt("00007", fingerprint="0" * 64).to_bytes())
    store._fs.rm_file(store.path(receipt_name("00008")))
    with pytest.raises(IdentityMismatch, match="receipt of shard 00007 has fingerprint 0000"):
        left(store, shards)
    assert gets(proxy, "/receipts/") == 1, "one that was written again is read again"
    store.replace(receipt_name("00007"), receipt("00007").to_bytes())
    assert left(store, shards) == ["00008", ids(MANY + 1)[-1]], "one that was deleted is gone"

    changed = [*shards[:20], shard("00020", etag="another"), *shards[21:]]
    with pytest.raises(SourceChanged, match=r"00020\.tar: its etag was 'abc-2' .* is 'another' now"):
        left(store, changed)


def cut(pack: bytes) -> bytes:
    return pack[: len(pack) // 2]


def garble(pack: bytes) -> bytes:
    return pack.replace(b"x", b"y")


@pytest.mark.parametrize("damage", [cut, garble])
def test_a_damaged_pack_costs_requests_and_nothing_else(
    bucket: tuple[Store, Proxy], damage: Callable[[bytes], bytes]
) -> None:
    store, _ = bucket
    put_receipts(store, [receipt(shard_id) for shard_id in ids(MANY)])
    shards = [shard(shard_id) for shard_id in ids(MANY)]
    assert left(store, shards) == []
    (name,) = store.names("runs", ".receipts")
    store.replace(f"runs/{name}", damage(store.read_bytes(f"runs/{name}")))
    assert left(store, shards) == []
    folder = DatasetFolder(store)
    committed = folder.committed()
    assert list(folder.receipts(committed, folder.packs.load(committed))) == [receipt(one) for one in ids(MANY)]


def test_commits_leave_packs_behind(bucket: tuple[Store, Proxy]) -> None:
    store, proxy = bucket
    stored = [stored_shard(store, shard_id) for shard_id in ids(MANY)]
    assert sum(1 for _ in commit_all(plan_for(store), stored, RunLog(), set_aside_poison=False)) == MANY
    proxy.heads.clear()
    assert left(store, [shard(shard_id) for shard_id in ids(MANY)]) == []
    assert (gets(proxy, "/receipts/"), gets(proxy, ".receipts")) == (0, 1)


def test_a_full_pack_is_written_at_once_and_a_small_rest_is_not(s3_server: S3Server) -> None:
    store = Store(f"{s3_server.url}/full-pack", options=s3_server.options)
    packs = DatasetFolder(store).packs
    for number in range(RECEIPTS_PER_PACK + WORTH_PACKING - 1):
        packs.add(b"%d" % number)
    assert len(list(store.names("runs", ".receipts"))) == 1
    packs.flush()
    assert len(list(store.names("runs", ".receipts"))) == 1


# commits


class SlowStore(Store):
    """Counts the receipts that are being created, each of which takes a while."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.at_once = self.most_at_once = 0
        self.guard = threading.Lock()

    @contextmanager
    def counted(self) -> Iterator[None]:
        with self.guard:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        yield
        with self.guard:
            self.at_once -= 1

    def create(self, name: str, content: bytes | Path) -> bool:
        if not name.startswith("receipts/"):
            return super().create(name, content)
        with self.counted():
            time.sleep(0.05)
            return super().create(name, content)


def stored_shard(store: Store, shard_id: str) -> ShardStored:
    one = receipt(shard_id)
    for stored in (one.payload, one.index):
        store.create(stored.path, bytes(stored.size))
    return ShardStored(shard_id=shard_id, receipt=one, seconds={"encode": 1.0})


def plan_for(store: Store) -> RunPlan:
    folder: Any = DatasetFolder(store)
    nothing: Any = None
    return RunPlan(settings=nothing, dataset=folder, run_file=run_file(), shards=(), todo=(), samples_todo=None)


def test_commits_overlap_and_are_bounded(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path / "out"))
    outcomes = [stored_shard(store, shard_id) for shard_id in ids(200)]
    log = RunLog()
    standing = list(commit_all(plan_for(store), outcomes, log, set_aside_poison=False))
    assert sorted(one.shard_id for one in standing) == ids(200) == sorted(log.shard_seconds)
    assert DatasetFolder(store).receipt_ids() == ids(200)
    assert 1 < store.most_at_once <= COMMITS_AT_ONCE


def test_what_comes_slowly_is_committed_before_the_next_is_awaited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.run.HURRY_SECONDS", 0.0)
    store = SlowStore(str(tmp_path / "out"))
    committed: list[str] = []

    def outcomes() -> Iterator[ShardOutcome]:
        for shard_id in ids(3):
            assert committed == ids(int(shard_id))
            yield stored_shard(store, shard_id)

    for one in commit_all(plan_for(store), outcomes(), RunLog(), set_aside_poison=False):
        committed.append(one.shard_id)
    assert committed == ids(3)


@pytest.mark.parametrize(
    ("end", "error"),
    [
        (ShardFailed(shard_id="bad", error="its disk is full"), ShardError),
        (ShardPoisoned(shard_id="bad", poison_attempts=3), PoisonShard),
    ],
)
def test_a_failure_leaves_the_receipts_of_all_that_came_before(
    tmp_path: Path, end: ShardOutcome, error: type[ShardError]
) -> None:
    store = SlowStore(str(tmp_path / "out"))
    outcomes = [*(stored_shard(store, shard_id) for shard_id in ids(10)), end]
    log = RunLog()
    with pytest.raises(error, match="shard bad: "):
        list(commit_all(plan_for(store), outcomes, log, set_aside_poison=False))
    assert DatasetFolder(store).receipt_ids() == ids(10) == sorted(log.finished_at)


def test_a_commit_that_fails_is_raised(tmp_path: Path) -> None:
    store = SlowStore(str(tmp_path / "out"))
    outcomes = [stored_shard(store, shard_id) for shard_id in ids(3)]
    Path(store.path("shards/00001.tar")).unlink()
    with pytest.raises(DatasetError, match=r"shard 00001: its encoder stored 100 bytes .* the driver finds nothing"):
        list(commit_all(plan_for(store), outcomes, RunLog(), set_aside_poison=False))
    assert DatasetFolder(store).receipt_ids() == ["00000", "00002"]
