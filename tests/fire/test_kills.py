"""kill -9 of the job's processes at chosen moments: the dataset is that of an undisturbed run, byte for byte."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from pipeline.decode.pool import DecodePool
from pipeline.policies import DecodePolicy
from tests.fire.harness import SHARDS, Fire, command_of, wait_for

pytestmark = pytest.mark.timeout(1800)


def test_the_run_goes_on_without_a_killed_encode_actor(fire: Fire, tmp_path: Path) -> None:
    with fire.run(tmp_path) as run:
        run.kill_at_work("actor")
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


def test_the_run_goes_on_without_a_killed_decode_child(fire: Fire, tmp_path: Path) -> None:
    """Beside it an actor waits for room that never comes."""
    with fire.run(tmp_path, num_actors=3) as run:
        run.kill_at_work("child")
        assert run.finish() == 0, run.log.read_text()
    assert "decode child died: clip=" in run.log.read_text()
    fire.require_equal(tmp_path)


def test_a_run_whose_driver_is_killed_twice_is_finished_by_the_third(fire: Fire, tmp_path: Path) -> None:
    """One actor, so that shards come to their ends one after another."""
    with fire.run(tmp_path, num_actors=1) as run:
        run.node_at_work()
        run.kill()
    with fire.run(tmp_path, num_actors=1) as run:
        run.wait_for(run.receipts, "a receipt")
        run.kill()
    assert run.receipts() < SHARDS
    assert not (run.output / "manifest.json").exists()
    with fire.run(tmp_path) as run:
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


def test_a_run_that_is_told_to_stop_says_so_and_goes_on_later(fire: Fire, tmp_path: Path) -> None:
    """SIGTERM, as a scheduler sends it."""
    with fire.run(tmp_path, num_actors=1) as run:
        run.wait_for(run.receipts, "a receipt")
        run.driver.terminate()
        assert run.finish() != 0
    text = run.log.read_text()
    (report,) = [json.loads(path.read_text()) for path in (run.output / "runs").glob("*.json")]
    assert report["outcome"] == "stopped", text
    assert f"stopped: {run.receipts()} of {SHARDS} shards are committed" in text
    assert "Traceback" not in text
    with fire.run(tmp_path) as run:
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


def test_a_decode_child_killed_as_it_starts_is_started_again() -> None:
    """In this process, where the moment can be had."""

    def first_child() -> list[psutil.Process]:
        return [child for child in psutil.Process().children() if "pipeline.decode.child" in command_of(child)]

    with ThreadPoolExecutor(1) as thread:
        starting = thread.submit(DecodePool, DecodePolicy(), 1)
        wait_for(first_child, "a decode child")[0].kill()
        with starting.result() as pool:
            assert pool.decoders
