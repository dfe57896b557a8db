"""One cluster and one undisturbed run for all tests that kill things."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fire.harness import NODES, SHARDS, Fire, FireCluster, undisturbed


@pytest.fixture(scope="session")
def burning(
    ray_environment: dict[str, str], v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Fire]:
    folder = tmp_path_factory.mktemp("fire")
    v2d_shards(folder / "source", num_shards=SHARDS, good=3, failed=1, broken=1)
    cluster = FireCluster()
    try:
        cluster.resize(NODES)
        yield undisturbed(cluster, folder / "source", folder)
    finally:
        cluster.close()


@pytest.fixture
def fire(burning: Fire) -> Fire:
    """The cluster whole again, whatever the test before has killed."""
    burning.cluster.resize(NODES)
    return burning
