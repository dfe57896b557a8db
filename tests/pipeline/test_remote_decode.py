"""An encoder whose clips are decoded by children that Ray starts: equal bytes, whatever is killed."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.config import EncodeConfig
from jobs.encode_webvid import run_encode
from pipeline.dataflow import ActorShape, require_room
from pipeline.remote_decode import MISSED_SECONDS, RemoteShape, _Missed

DECODERS = 2
"""What the tests' Ray lends."""


def config_for(source: Path, output: Path, cluster: dict[str, Any]) -> EncodeConfig:
    return EncodeConfig.model_validate(
        {
            "source": {"urls": str(source), "kind": "webdataset"},
            "output": {"url": str(output)},
            "vae": {"spec": "cvvae-sd21-tiny", "seed": 3},
            "windows": {"tail": "trim", "min_tail_frames": 5},
            "resize": {"buckets": [[64, 64], [48, 96]]},
            "decode": {"windows_in_flight": 1},
            "encode": {"threads": 1, "batch_pixels": 2 * 17 * 64 * 64},
            # two actors' shares, and one shard: the cores of the other are free
            "cluster": {"num_actors": 2, **cluster},
        }
    )


def stored(output: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(output)): path.read_bytes()
        for folder in ("shards", "index", "receipts")
        for path in (output / folder).iterdir()
    }


def relays() -> list[psutil.Process]:
    """Ray's workers that have a decode child for an encoder elsewhere; ours, since another Ray may run here."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "decode-elsewhere" in " ".join(process.cmdline()):
                found.append(process)
    return found


def store_mebibytes(address: str) -> int:
    from ray._private.internal_api import memory_summary

    found = re.search(r"Plasma memory usage (\d+) MiB", memory_summary(address, stats_only=True))
    return int(found[1]) if found else 0


class Watch:
    """What was seen while a run went on; the first relay that holds a clip is killed."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.children: set[psutil.Process] = set()
        """Those that held a clip."""
        self.killed: list[int] = []
        self.most_mebibytes = 0

    @contextmanager
    def during(self) -> Iterator[None]:
        leaving = threading.Event()

        def look() -> None:
            due = 0.0
            while not leaving.wait(0.02):
                for relay in relays():
                    self._look_at(relay)
                if self.children and not leaving.is_set() and time.monotonic() >= due:
                    due = time.monotonic() + 0.5
                    self.most_mebibytes = max(self.most_mebibytes, store_mebibytes(self._address))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        try:
            yield
        finally:
            leaving.set()
            thread.join(timeout=30)

    def _look_at(self, relay: psutil.Process) -> None:
        with suppress(psutil.Error, OSError):
            for child in relay.children():
                fds = Path(f"/proc/{child.pid}/fd")
                if any("/memfd:" in str(fd.readlink()) for fd in fds.iterdir()):  # it holds a clip
                    self.children.add(child)
                    if not self.killed:
                        self.killed.append(relay.pid)
                        relay.kill()


def test_a_dataset_is_the_same_wherever_its_clips_were_decoded(
    v2d_shards: Callable[..., list[Path]], tmp_path: Path, ray_cluster: str
) -> None:
    """Good and broken clips; Ray's worker of one remote decoder is killed over a clip."""
    v2d_shards(tmp_path / "source", num_shards=1, good=5, failed=1, broken=1)
    local = config_for(tmp_path / "source", tmp_path / "local", {"decode_children": 1, "address": ray_cluster})
    elsewhere = {"decode_children": 0, "remote_decoders": DECODERS, "address": ray_cluster}
    remote = config_for(tmp_path / "source", tmp_path / "remote", elsewhere)
    run_encode(local)
    watch, before = Watch(ray_cluster), store_mebibytes(ray_cluster)
    with watch.during():
        counts = run_encode(remote).counts
    assert (counts.clips_encoded, counts.clips_rejected) == (5, 2)
    assert stored(tmp_path / "remote") == stored(tmp_path / "local")
    assert len(watch.killed) == 1
    assert watch.children
    assert watch.most_mebibytes <= before + 1, "frames do not go through Ray's object store"
    _, alive = psutil.wait_procs(watch.children, timeout=30)
    assert alive == [], "no decode child outlives the run"


def test_a_cluster_that_lends_no_cores_is_told_how(caplog: pytest.LogCaptureFixture) -> None:
    shape = ActorShape(num_actors=2, num_gpus=1, decode_children=1, encode_threads=1, num_cpus=2, remote_decoders=8)
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 16.0, "decode": 16.0}]
    require_room(shape, nodes)
    assert caplog.text == ""
    require_room(shape, nodes[:1])
    assert "lent=0 wanted=16" in caplog.text
    assert """--resources '{"decode": CORES}'""" in caplog.text


def test_decoders_that_do_not_come_are_missed_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("pipeline.remote_decode.time.monotonic", lambda: now[0])
    missed = _Missed(RemoteShape(number=3, num_cpus=1, resource="decode"))
    for second in range(1, int(MISSED_SECONDS * 3)):
        now[0] = float(second)
        missed.look(2)
    assert [record.getMessage().split(" seconds")[0] for record in caplog.records] == [
        "remote decoders are missing: present=2 wanted=3"
    ] * 2
    missed.look(3)
    now[0] += MISSED_SECONDS - 1
    missed.look(0)
    assert len(caplog.records) == 2
