"""How far a dataset is: from documents in a store and their times alone."""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.dataset import DatasetFolder, receipt_name
from pipeline.documents import Counts, RejectionRecord
from pipeline.errors import DatasetError
from pipeline.manifest import build_manifest
from pipeline.receipt_packs import WORTH_PACKING
from pipeline.run_log import SHOWN_SHARDS, RunLog
from pipeline.status import RATE_SECONDS, SILENT_AFTER, StatusReader
from pipeline.storage import Store
from tests.pipeline.example_documents import receipt, run_file
from tests.s3_server import S3Server

COUNTS = Counts(samples=4, clips_encoded=2, clips_rejected=2, windows_decoded=3, windows_stored=3, frames_stored=51)


def rejected(*classes: str) -> tuple[RejectionRecord, ...]:
    return tuple(
        RejectionRecord(key=f"k{number}", scope="clip", stage="read", error_class=name, message="why")
        for number, name in enumerate(classes)
    )


def put_receipt(store: Store, shard: str, at: float | None = None, **changes: Any) -> None:
    fields: dict[str, Any] = {"counts": COUNTS, "rejections": rejected("upstream_failed", "timeout")}
    store.replace(receipt_name(shard), receipt(shard, **fields | changes).to_bytes())
    if at is not None:
        os.utime(store.path(receipt_name(shard)), (at, at))


def put_pulse(store: Store, log: RunLog, under_way: dict[str, float] | None = None, *, written: float) -> None:
    DatasetFolder(store).write_run_report(log.run_id, log.pulse(under_way or {}) | {"written_unix": written})


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(str(tmp_path / "out"))
    DatasetFolder(store).claim(run_file())
    return store


def test_a_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"run\.json does not exist"):
        StatusReader(Store(str(tmp_path))).read()


def test_a_run_in_progress(store: Store) -> None:
    now = time.time()
    log = RunLog(started=now - 1000, shards_total=10)
    for number in range(4):  # one every 100 seconds, the last one 100 seconds ago
        put_receipt(store, f"{number:05d}", now - 400 + 100 * number)
        log.note(f"{number:05d}", {"encode": 10.0 * (number + 1), "store": 1.0})
    put_pulse(store, log, {"00004": 90.0, "00005": 30.0}, written=now)
    look = StatusReader(store).read()
    assert (look.done, look.total, look.left, look.finished) == (4, 10, 6, False)
    assert look.counts.samples == 16
    assert look.rejections == {"upstream_failed": 4, "timeout": 4}
    assert look.rate is not None
    assert (look.rate.shards, look.rate.frames) == (3, 153)
    assert look.rate.seconds == pytest.approx(400, abs=2), "up to now, so that it falls while nothing comes"
    assert look.eta_seconds == pytest.approx(6 * 400 / 3, rel=0.01)
    assert look.last_receipt_seconds == pytest.approx(100, abs=2)
    assert look.driver_silent_seconds is None
    assert look.run is not None
    assert look.run.slowest_shards[0] == ("00003", 41.0)
    assert look.run.under_way == (("00004", 90.0), ("00005", 30.0))


def test_the_rate_forgets_what_is_long_past(store: Store) -> None:
    """Receipts of a run before, and of this one's slow beginning, do not count once there are enough fresh ones."""
    now = time.time()
    log = RunLog(started=now - 3 * RATE_SECONDS, shards_total=100)
    put_receipt(store, "00000", now - 10 * RATE_SECONDS)
    put_receipt(store, "00001", now - 2 * RATE_SECONDS)
    for number in range(2, 32):
        put_receipt(store, f"{number:05d}", now - 300 + 10 * (number - 2))
    put_pulse(store, log, written=now)
    rate = StatusReader(store).read().rate
    assert rate is not None
    assert rate.shards == 29
    assert rate.seconds == pytest.approx(300, abs=2)


def test_a_driver_that_is_gone_is_named(store: Store) -> None:
    now = time.time()
    put_receipt(store, "00000", now - 50)
    put_pulse(store, RunLog(started=now - 500, shards_total=3), written=now - SILENT_AFTER - 60)
    silent = StatusReader(store).read().driver_silent_seconds
    assert silent == pytest.approx(SILENT_AFTER + 60, abs=2)


def test_a_finished_dataset_needs_no_receipt(store: Store) -> None:
    folder = DatasetFolder(store)
    for shard in ("00000", "00001"):
        put_receipt(store, shard)
    folder.finish(build_manifest(folder.run_file(), folder.receipts(folder.receipt_ids()), ["00002"]), "card")
    expected = StatusReader(store).read()
    for shard in ("00000", "00001"):
        Path(store.path(receipt_name(shard))).write_text("not looked at")
    look = StatusReader(store).read()
    assert (look.finished, look.done, look.total) == (True, 2, 3)
    assert (look.counts, look.rejections, look.payload_bytes) == (
        expected.counts,
        {"timeout": 2, "upstream_failed": 2},
        200,
    )


def test_looking_again_reads_what_is_new(store: Store) -> None:
    reader = StatusReader(store)
    put_receipt(store, "00000")
    assert reader.read().counts.samples == 4
    Path(store.path(receipt_name("00000"))).write_text("read before")
    put_receipt(store, "00001")
    assert reader.read().counts.samples == 8
    Path(store.path(receipt_name("00000"))).unlink()  # to encode that shard anew
    assert reader.read().counts.samples == 4


def test_the_pulse_stays_short_however_many_shards(store: Store) -> None:
    log = RunLog()
    for number in range(1000):
        log.note(f"{number:05d}", {"encode": float(number)})
    pulse = log.pulse({f"{number:05d}": float(number) for number in range(1000)})
    assert [name for name, _ in pulse["slowest_shards"]] == [f"{n:05d}" for n in range(999, 999 - SHOWN_SHARDS, -1)]
    assert pulse["under_way"] == pulse["slowest_shards"]
    assert len(str(pulse)) < 2000


def test_on_s3_from_packs_and_without_a_write(s3_server: S3Server) -> None:
    store = Store(f"{s3_server.url}/status-{secrets.token_hex(4)}", options=s3_server.options)
    folder = DatasetFolder(store)
    folder.claim(run_file())
    names = [f"{number:05d}" for number in range(WORTH_PACKING + 5)]
    reasons = rejected("upstream_failed", "timeout")
    for shard in names:
        put_receipt(store, shard)
        if shard != names[-1]:
            folder.packs.add(receipt(shard, counts=COUNTS, rejections=reasons).to_bytes())
    folder.packs.flush()
    put_pulse(store, RunLog(started=time.time() - 3600, shards_total=200), written=time.time())
    before = sorted(store.names("runs", ""))
    look = StatusReader(store).read()
    assert look.counts.samples == 4 * len(names)
    assert look.rejections == {"upstream_failed": len(names), "timeout": len(names)}
    assert look.rate is not None, "the store's own times are read"
    assert look.last_receipt_seconds is not None
    assert look.last_receipt_seconds < 120
    assert sorted(store.names("runs", "")) == before
