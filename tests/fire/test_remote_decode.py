"""Encoders on a node with too few cores, remote decode children on two others, of which one goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.fire.harness import (
    EncodeRun,
    FireCluster,
    FireNode,
    _children,
    _holds_a_clip,
    command_of,
    config_for,
    dataset_bytes,
    differences,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def cluster(ray_environment: dict[str, str]) -> Iterator[FireCluster]:
    made = FireCluster()
    try:
        made.add_node(num_cpus=2)
        for _ in range(2):
            made.add_node(num_cpus=1, resources={"decode": 1})
        yield made
    finally:
        made.close()


def busy_children(node: FireNode) -> list[psutil.Process]:
    """Decode children for encoders elsewhere that hold a clip."""
    relays = [process for process in _children(node.raylet) if "decode-elsewhere" in command_of(process)]
    return [child for relay in relays for child in _children(relay) if _holds_a_clip(child)]


def test_the_run_goes_on_when_a_decode_node_goes(
    cluster: FireCluster, v2d_shards: Callable[..., list[Path]], tmp_path: Path
) -> None:
    """With the bytes of a run that decodes on the encoder's node alone."""
    v2d_shards(tmp_path / "source", num_shards=3, good=4, failed=1, broken=1)
    encoding, *decoding = cluster.nodes
    local = config_for(cluster, tmp_path / "source", tmp_path / "local" / "out", 1)
    with EncodeRun(cluster, local, tmp_path / "local") as run:
        assert run.finish() == 0, run.log.read_text()
    remote = config_for(cluster, tmp_path / "source", tmp_path / "remote" / "out", 1)
    remote["cluster"] |= {"decode_children": 0, "remote_decoders": 2}
    cluster.wait_until_idle()
    with EncodeRun(cluster, remote, tmp_path / "remote") as run:
        run.wait_for(lambda: any(busy_children(node) for node in decoding), "a clip decoded elsewhere")
        assert not encoding.shards_begun() or encoding.actors()
        cluster.kill_node(next(node for node in decoding if busy_children(node)))
        assert run.finish() == 0, run.log.read_text()
    assert differences(tmp_path / "remote" / "out", dataset_bytes(tmp_path / "local" / "out")) == []
    cluster.wait_until_idle()
