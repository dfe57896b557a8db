"""decide_shape: how a cluster is cut into encode actors. No Ray is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.cluster import MAX_DECODE_CHILDREN, connected, decide_shape, require_lasting_output
from jobs.config import ClusterConfig
from pipeline.dataflow import ActorShape
from pipeline.errors import ConfigError, PipelineError
from pipeline.policies import EncodePolicy

GIB = float(1 << 30)


def node(cpus: float, gpus: float = 0.0) -> dict[str, float]:
    """As Ray reports it: without the resources that it has none of."""
    resources = {"CPU": cpus, "GPU": gpus, "memory": 4 * GIB * cpus, "object_store_memory": GIB}
    return {name: amount for name, amount in resources.items() if amount}


def shape(
    nodes: list[dict[str, float]], *, shards: int = 1000, threads: int | None = None, **config: Any
) -> ActorShape:
    return decide_shape(ClusterConfig(**config), EncodePolicy(threads=threads), nodes, shards)


@pytest.mark.parametrize(
    ("cores", "actors", "children", "threads", "reserved"),
    [
        (1, 1, 1, 1, 1),
        (2, 1, 1, 2, 2),
        (4, 1, 1, 3, 4),
        (8, 1, 2, 6, 8),
        (16, 2, 2, 6, 8),
        (64, 8, 2, 6, 8),
    ],
)
def test_one_machine_without_gpu(cores: int, actors: int, children: int, threads: int, reserved: float) -> None:
    found = shape([node(cores)])
    assert (found.num_actors, found.decode_children, found.encode_threads) == (actors, children, threads)
    assert (found.num_gpus, found.num_cpus, found.max_attempts) == (0.0, reserved, 3)
    if cores > 2:
        assert actors * (threads + children) <= cores


@pytest.mark.parametrize(
    ("nodes", "actors", "children", "reserved"),
    [
        ([node(128, 8)], 8, 15, 16.0),
        ([node(128, 8)] * 4, 32, 15, 16.0),
        ([node(16), node(128, 8), node(16)], 8, 15, 16.0),
        ([node(256, 8)], 8, 16, 17.0),
        ([node(12, 1)], 1, 11, 12.0),
        ([node(32, 8)], 8, 3, 4.0),
        ([node(128, 8), node(16, 4)], 12, 3, 4.0),
    ],
)
def test_one_actor_per_gpu(nodes: list[dict[str, float]], actors: int, children: int, reserved: float) -> None:
    found = shape(nodes)
    assert (found.num_actors, found.num_gpus) == (actors, 1.0)
    assert (found.decode_children, found.encode_threads, found.num_cpus) == (children, 1, reserved)
    assert found.decode_children <= MAX_DECODE_CHILDREN


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"num_actors": 3}, {"num_actors": 3}),
        ({"decode_children": 5}, {"decode_children": 5, "num_cpus": 6.0}),
        ({"gpus_per_actor": 2}, {"num_actors": 4, "num_gpus": 2.0, "decode_children": 16}),
        ({"gpus_per_actor": 0.5}, {"num_actors": 16, "num_gpus": 0.5, "decode_children": 7, "num_cpus": 8.0}),
        ({"gpus_per_actor": 0.2}, {"num_actors": 40, "num_gpus": 0.2, "decode_children": 2}),
        ({"gpus_per_actor": 0}, {"num_actors": 16, "num_gpus": 0.0, "encode_threads": 6}),
        ({"max_attempts": 7}, {"max_attempts": 7}),
        ({"remote_decoders": 8}, {"remote_decoders": 8, "decode_children": 15, "num_cpus": 16.0}),
        ({"decode_children": 0, "remote_decoders": 8}, {"decode_children": 0, "num_cpus": 1.0}),
        ({"num_actors": 2, "gpus_per_actor": 0, "decode_children": 4}, {"num_actors": 2, "encode_threads": 60}),
    ],
)
def test_the_config_decides(config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = shape([node(128, 8)], **config)
    assert {name: getattr(found, name) for name in expected} == expected


def test_encode_threads_are_configurable_without_a_gpu() -> None:
    assert shape([node(8)], threads=3).encode_threads == 3


def test_no_more_actors_than_shards() -> None:
    assert shape([node(128, 8)], shards=3).num_actors == 3
    assert shape([node(64)], shards=1).num_actors == 1
    assert shape([node(2)], shards=0).num_actors == 1


def test_an_actor_has_its_gpus_on_one_node() -> None:
    """Two nodes of three GPUs hold two actors of two GPUs, not three."""
    assert shape([node(24, 3)] * 2, gpus_per_actor=2).num_actors == 2


@pytest.mark.parametrize(
    ("nodes", "config", "message"),
    [
        ([], {}, "the cluster has no node"),
        ([node(64)], {"gpus_per_actor": 1}, "and 1 GPU on one node; the cluster has 64 CPU and 0 GPU"),
        ([node(128, 8)], {"gpus_per_actor": 9}, "9 GPU on one node"),
        ([node(8, 1)] * 8, {"gpus_per_actor": 2}, "2 GPU on one node"),
        ([node(8, 1)], {"decode_children": 8}, "needs 9 CPU and 1 GPU .*Lower cluster.decode_children"),
        ([node(16), node(0, 4)], {"decode_children": 1}, "needs 2 CPU and 1 GPU"),
    ],
)
def test_no_room_is_an_error_before_anything_waits(
    nodes: list[dict[str, float]], config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        shape(nodes, **config)


nodes_with_gpus = st.lists(st.builds(node, st.integers(1, 256), st.integers(0, 16)), min_size=1, max_size=5)


@given(nodes=nodes_with_gpus)
def test_derived_actors_all_fit(nodes: list[dict[str, float]]) -> None:
    """Whatever the cluster, no GPU is left idle because its neighbours took the cores."""
    found = shape(nodes)
    assert found.decode_children >= 1
    assert found.encode_threads >= 1
    if not any("GPU" in one for one in nodes):
        return
    assert found.num_actors == sum(one.get("GPU", 0) for one in nodes)
    for one in nodes:
        assert found.num_cpus * one.get("GPU", 0) <= one["CPU"] + 1e-9


def test_an_output_inside_a_submitted_jobs_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray deletes that folder after the job; a relative output.url would be lost with it."""
    package = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0123"
    package.mkdir(parents=True)
    require_lasting_output(str(package / "out"))
    monkeypatch.chdir(package)
    require_lasting_output(str(tmp_path / "out"))
    require_lasting_output("s3://bucket/out")
    with pytest.raises(ConfigError, match=r"output\.url: .*expected an absolute path"):
        require_lasting_output(str(package / "out"))


def test_a_ray_that_does_not_start_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray raises a bare Exception for it, whose traceback has a hundred lines."""

    def too_slow(**options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray.is_initialized", lambda: False)  # by another test of this process
    monkeypatch.setattr("ray.init", too_slow)
    with (
        pytest.raises(PipelineError, match=r"does not start on this machine: The current node timed out.*address"),
        connected(ClusterConfig()),
    ):
        pass
