"""One line per event, whatever stands in keys and messages; quiet when nothing is asked for."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from pipeline.documents import RejectionRecord
from pipeline.event_log import log_receipt, set_up_log
from pipeline.run_monitor import RunProgress, ShardUnderWay
from pipeline.stall_watch import StallWatch
from tests.pipeline.example_documents import receipt

WORKER = logging.getLogger("pipeline.decode.worker")
NASTY = RejectionRecord(
    key='a "key"\nshard=00009', scope="clip", stage="decode", error_class="timeout", message="60 s\nof CPU"
)


@pytest.fixture(autouse=True)
def quiet_again() -> Iterator[None]:
    yield
    set_up_log("none")


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_log("json")
    log_receipt(receipt("00007", rejections=(NASTY,)))
    WORKER.warning("decode child replaced: clip=%s", "k")
    committed, rejected, warning = map(json.loads, capsys.readouterr().err.splitlines())
    assert (committed["event"], committed["shard"], committed["windows"]) == ("shard_committed", "00007", 5)
    assert (committed["rejected"], committed["level"]) == (1, "info")
    assert (rejected["event"], rejected["key"], rejected["message"]) == ("rejected", NASTY.key, NASTY.message)
    assert rejected["error_class"] == "timeout"
    assert (warning["level"], warning["text"]) == ("warning", "decode child replaced: clip=k")


def test_key_value_lines_cannot_be_forged(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_log("key_value")
    set_up_log("key_value")  # once is enough
    log_receipt(receipt("00007", rejections=(NASTY,)))
    committed, rejected = capsys.readouterr().err.splitlines()
    assert "event=shard_committed shard=00007 samples=3 clips=2 windows=5" in committed
    assert 'shard=00007 key="a \\"key\\"\\nshard=00009" scope=clip' in rejected
    assert 'message="60 s\\nof CPU"' in rejected


def test_quiet_without_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    set_up_log("key_value")
    set_up_log("none")
    log_receipt(receipt("00007"))
    assert capsys.readouterr().err == ""


class Hand:
    """A clock moved by hand."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def progress(*, frames: float, shards: tuple[str, ...] = ("00003",), silent: float = 1.0) -> RunProgress:
    return RunProgress(
        figures={"a": {"frames": frames, "state.store": frames + 1}},
        silent_seconds={"a": silent},
        under_way={shard: ShardUnderWay("a", 10.0) for shard in shards},
    )


def test_an_encoder_that_stands_is_named_and_not_over_and_over(caplog: pytest.LogCaptureFixture) -> None:
    clock = Hand()
    watch = StallWatch(100, clock=clock)
    for clock.now in range(0, 401, 10):
        watch.look(progress(frames=5.0, shards=("00004", "00003"), silent=90.0 if clock.now > 150 else 1.0))
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        "encoder stalled: encoder=a shards=00003,00004 seconds=100: it reports, but nothing moves",
        "encoder stalled: encoder=a shards=00003,00004 seconds=200: it does not report either",
        "encoder stalled: encoder=a shards=00003,00004 seconds=400: it does not report either",
    ]


def test_an_encoder_that_moves_or_has_nothing_to_do_is_not(caplog: pytest.LogCaptureFixture) -> None:
    clock = Hand()
    watch = StallWatch(100, clock=clock)
    for clock.now in range(0, 1000, 90):
        watch.look(progress(frames=clock.now))
    for clock.now in range(1000, 2000, 90):
        watch.look(progress(frames=1.0, shards=()))
    assert caplog.records == []
