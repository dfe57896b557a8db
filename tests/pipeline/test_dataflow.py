"""What the Ray part adds: attempts are counted, a poison shard is named or set aside, errors keep their shard."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import cast

import psutil
import pytest

from jobs.config import EncodeConfig
from jobs.encode_webvid import run_encode
from pipeline.dataflow import ActorShape, RunMonitor, _AloneGate, actors_that_fit, require_room
from pipeline.errors import ConfigError, PoisonShard, ShardError
from pipeline.run import RunLog, RunPlan, commit_all
from pipeline.scratch import default_root
from pipeline.shard import ShardPoisoned
from pipeline.storage import Store
from pipeline.verify import verify_dataset


def test_gate_lets_many_in_or_one_alone() -> None:
    gate = _AloneGate()
    inside: list[str] = []
    seen: list[tuple[str, ...]] = []
    guard = threading.Lock()

    def enter(name: str, alone: bool) -> None:
        with gate.enter(alone=alone):
            with guard:
                inside.append(name)
                seen.append(tuple(sorted(inside)))
            time.sleep(0.02)
            with guard:
                inside.remove(name)

    names = [("alone" if n % 3 == 0 else "open") + f"-{n}" for n in range(12)]
    threads = [threading.Thread(target=enter, args=(name, name.startswith("alone"))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert len(seen) == 12
    assert all(len(names) == 1 for names in seen if any(name.startswith("alone") for name in names))


def test_monitor_counts_what_was_begun_and_not_ended() -> None:
    monitor = RunMonitor()
    monitor.begin("a")
    monitor.begin("a")
    monitor.begin("b")
    monitor.end("b")
    assert (monitor.attempts("a"), monitor.attempts("b"), monitor.attempts("c")) == (2, 0, 0)


def test_a_cluster_without_room_is_an_error_not_a_wait() -> None:
    shape = ActorShape(num_actors=1, num_gpus=1, decode_children=7, encode_threads=1, num_cpus=8)
    require_room(shape, [{"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}])
    with pytest.raises(ConfigError, match=r"8 CPU and 1 GPU on one node; the cluster has 2 CPU and 0 GPU, 64 CPU"):
        require_room(shape, [{"CPU": 2.0}, {"CPU": 64.0}])


def test_actors_that_fit_are_counted_per_node() -> None:
    gpu = ActorShape(num_actors=9, num_gpus=0.2, decode_children=1, encode_threads=1, num_cpus=2)
    assert actors_that_fit(gpu, [{"CPU": 64.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 8.0}, {"CPU": 64.0}]) == 5 + 2
    cpu = ActorShape(num_actors=3, num_gpus=0, decode_children=1, encode_threads=1, num_cpus=1)
    assert actors_that_fit(cpu, [{"CPU": 2.0}]) == 2


def config_for(source: Path, output: Path, address: str) -> EncodeConfig:
    return EncodeConfig.model_validate(
        {
            "source": {"urls": str(source), "kind": "webdataset"},
            "output": {"url": str(output)},
            "vae": {"spec": "cvvae-sd21-tiny"},
            "resize": {"buckets": [[64, 64]]},
            "encode": {"threads": 1},
            "cluster": {
                "address": address,
                "num_actors": 1,
                "decode_children": 1,
                "max_attempts": 2,
                "on_poison_shard": "set_aside",
            },
        }
    )


@contextmanager
def killing_encode_actors_in(scratch: Path, shard_id: str) -> Iterator[list[int]]:
    """SIGKILL every encode actor that has begun the shard, as the kernel's OOM killer would."""
    killed: list[int] = []
    leaving = threading.Event()

    def hunt() -> None:
        while not leaving.wait(0.05):
            if not list(scratch.glob(f"*/{shard_id}-*")):
                continue
            for process in psutil.Process().children(recursive=True):  # ours: another Ray may run on this machine
                with suppress(psutil.NoSuchProcess):
                    if "EncodeShards" in " ".join(process.cmdline()) and process.pid not in killed:
                        process.kill()
                        killed.append(process.pid)
            for folder in scratch.glob(f"*/{shard_id}-*"):
                folder.rename(folder.with_name("seen-" + folder.name))

    thread = threading.Thread(target=hunt, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        leaving.set()
        thread.join(timeout=10)


def test_a_shard_that_ends_its_actor_too_often_is_set_aside(
    v2d_shards: Callable[..., list[Path]], tmp_path: Path, ray_cluster: str
) -> None:
    """Actors are killed for real; everything else is encoded, and the next run takes the shard up again."""
    source, output = tmp_path / "source", tmp_path / "out"
    v2d_shards(source, num_shards=2, good=1, failed=0, broken=0)
    config = config_for(source, output, ray_cluster)
    with killing_encode_actors_in(default_root(), "00001") as killed:
        manifest = run_encode(config)
    assert len(killed) == 2
    assert manifest.set_aside == ("00001",)
    assert [shard.id for shard in manifest.shards] == ["00000"]
    again = run_encode(config)
    assert (again.set_aside, len(again.shards)) == ((), 2)
    assert verify_dataset(Store(str(output))).problems == []


def test_by_default_such_a_shard_stops_the_run_with_its_name() -> None:
    outcomes = iter([ShardPoisoned(shard_id="00001", poison_attempts=3)])
    with pytest.raises(PoisonShard, match=r"shard 00001: ended its encode actor 3 times"):
        list(commit_all(cast(RunPlan, None), outcomes, RunLog(), set_aside_poison=False))


def test_errors_of_an_actor_reach_the_driver_with_their_shard(
    v2d_shards: Callable[..., list[Path]], tmp_path: Path, ray_cluster: str
) -> None:
    """A payload that is not ours stands under the shard's name: one message, the project's own type."""
    source, output = tmp_path / "source", tmp_path / "out"
    v2d_shards(source, num_shards=1, good=1, failed=0, broken=0)
    (output / "shards").mkdir(parents=True)
    (output / "shards" / "00000.tar").write_bytes(b"not a latent shard")
    with pytest.raises(ShardError, match=r"shard 00000: .*00000\.tar is damaged .*delete it") as caught:
        run_encode(config_for(source, output, ray_cluster))
    assert len(str(caught.value)) < 600, "no traceback inside"
    (output / "shards" / "00000.tar").unlink()
    assert run_encode(config_for(source, output, ray_cluster)).counts.clips_encoded == 1
