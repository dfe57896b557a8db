"""More than one writer, another identity, a changed source: the promised bytes, or one clear line."""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.sources import WebDatasetSource
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.fire.harness import (
    PROJECT,
    EncodeRun,
    Fire,
    config_for,
    dataset_bytes,
    differences,
    require_refusal,
    wait_for,
)

pytestmark = pytest.mark.timeout(900)


def test_two_drivers_on_one_output_both_finish(fire: Fire, tmp_path: Path) -> None:
    """Each has an actor of its own; whoever stores a shard first is right for both."""
    with fire.run(tmp_path, num_actors=1) as one, fire.run(tmp_path, num_actors=1) as other:
        for run in (one, other):
            assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


class LoneAttempt:
    """An attempt outside the cluster, which therefore knows nothing of it."""

    def __init__(self, folder: Path, config: dict[str, Any], shard_id: str, *overrides: str) -> None:
        self.scratch = folder / f"scratch-{shard_id}"
        self._receipt, self._log = folder / f"lone-{shard_id}.json", folder / f"lone-{shard_id}.log"
        path = folder / "lone.yaml"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "tests.fire.lone_attempt", str(path), shard_id, *overrides]
        with self._receipt.open("wb") as out, self._log.open("wb") as log:
            self.process = psutil.Popen(command, cwd=PROJECT, stdout=out, stderr=log)

    def stop_midway(self) -> None:
        """SIGSTOP once it has begun the shard."""
        wait_for(lambda: list(self.scratch.glob("*/*-*")) or self._ended(), "an attempt begun")
        self.process.suspend()
        assert not self._ended(), self._log.read_text()

    def receipt(self) -> bytes:
        """Go on, to the end."""
        with suppress(psutil.NoSuchProcess):
            self.process.resume()
        wait_for(self._ended, "the end of an attempt")
        assert self.process.wait() == 0, self._log.read_text()
        return self._receipt.read_bytes()

    def _ended(self) -> bool:
        return self.process.poll() is not None

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            self.process.kill()
        self.process.wait()


def test_late_attempts_report_what_stands(fire: Fire, tmp_path: Path) -> None:
    """Before the receipt and after it, with the run's numerics and with others: what was stored first stays, and who
    comes late says so."""
    output = tmp_path / "out"
    config = config_for(fire.cluster, fire.source, output, 1)
    other = "encode.batch_pixels=1"
    with ExitStack() as leaving:

        def attempt(shard_id: str, *overrides: str) -> LoneAttempt:
            started = LoneAttempt(tmp_path, config, shard_id, *overrides)
            leaving.callback(started.kill)
            return started

        early = {"00000": attempt("00000", other), "00003": attempt("00003")}
        late = {"00001": attempt("00001"), "00002": attempt("00002", other)}
        for one in late.values():
            one.stop_midway()
        stored = {shard: one.receipt() for shard, one in early.items()}
        with fire.run(tmp_path) as run:
            assert run.finish() == 0, run.log.read_text()
        finished = dataset_bytes(output)
        stored |= {shard: one.receipt() for shard, one in late.items()}
    assert dataset_bytes(output) == finished, "a late attempt changes nothing"
    assert {shard: finished[f"receipts/{shard}.json"] for shard in stored} == stored
    foreign = {"shards/00000.tar", "index/00000.parquet", "receipts/00000.json", "manifest.json"}
    assert set(differences(output, fire.reference)) <= foreign
    assert json.loads(stored["00000"])["numerics"]["batch_pixels"] == 1
    assert verify_dataset(Store(str(output)), source=WebDatasetSource(urls=str(fire.source))).problems == []


@pytest.fixture
def finished(fire: Fire, tmp_path: Path) -> Path:
    """A finished dataset in tmp_path/out, as the reference."""
    for name, content in fire.reference.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    run = tmp_path / "out/run.json"
    run.write_text(json.dumps({**json.loads(run.read_text()), "config": {}}))
    return tmp_path / "out"


def test_another_identity_and_a_changed_source_are_refused(fire: Fire, finished: Path, tmp_path: Path) -> None:
    before = dataset_bytes(finished)
    config = config_for(fire.cluster, fire.source, finished, 1)
    changed = config | {"windows": {"frames": 9}, "vae": {"spec": "cvvae-sd21-tiny", "seed": 4}}
    with EncodeRun(fire.cluster, changed, tmp_path / "other") as run:
        require_refusal(
            run, "IdentityMismatch", "windows.frames: the directory has 17, this run has 9", "weights_sha"
        )
    source = tmp_path / "source"
    shutil.copytree(fire.source, source)
    with (source / "00001.tar").open("ab") as tar:
        tar.write(bytes(10240))
    with EncodeRun(fire.cluster, config_for(fire.cluster, source, finished, 1), tmp_path / "changed") as run:
        require_refusal(run, "SourceChanged", f"{source}/00001.tar: its size was")
    assert dataset_bytes(finished) == before
