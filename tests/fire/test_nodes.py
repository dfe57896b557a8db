"""Machines that go, come late, or are slow: several raylets on this one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fire.harness import Fire, stopped

pytestmark = pytest.mark.timeout(1800)


@pytest.mark.parametrize("moment", ["as its encoder starts", "in a shard"])
def test_the_run_goes_on_when_a_node_goes(moment: str, fire: Fire, tmp_path: Path) -> None:
    """No other takes its place: what it had begun is done by the node that is left."""
    with fire.run(tmp_path) as run:
        if moment == "in a shard":
            node = run.node_at_work()
        else:
            node, _ = run.wait_for(lambda: fire.cluster.encoders("actor"), "an encoder")[0]
        fire.cluster.kill_node(node)
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)


def test_a_node_that_joins_late_does_the_work_of_a_slow_one(fire: Fire, tmp_path: Path) -> None:
    fire.cluster.resize(1)
    (slow,) = fire.cluster.nodes
    with fire.run(tmp_path) as run:
        run.wait_for(slow.shards_begun, "a shard begun")
        (actor,) = slow.actors()
        with stopped(actor):
            late = fire.cluster.add_node()
            run.wait_for(late.shards_begun, "a shard begun on the new node")
            run.wait_for(run.receipts, "a receipt of the new node's work")
        assert run.finish() == 0, run.log.read_text()
    fire.require_equal(tmp_path)
