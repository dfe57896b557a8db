"""The simulation runs the real dataflow, and what it reports is what happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.config import EncodeConfig
from jobs.simulate import Figures, make_source, measure_resume, simulate, simulated_config
from jobs.simulate_meter import ProcessMeter, Snapshot
from jobs.simulate_runner import ShardLoad
from pipeline.dataset import DatasetFolder
from pipeline.storage import Store
from tests.s3_server import S3Server, proxy_to

SHARDS = 40


def manifest_bytes(config: EncodeConfig) -> bytes:
    store = Store(config.output.url, options=config.output.options)
    return store.read_bytes("manifest.json")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory, ray_cluster: str) -> tuple[EncodeConfig, Figures]:
    """A run that only schedules, and its figures."""
    config = simulated_config(str(tmp_path_factory.mktemp("simulated")))
    make_source(config, SHARDS)
    return config, simulate(config, ShardLoad(), actors=2)


def test_every_shard_is_stored_committed_and_in_the_manifest(
    simulated: tuple[EncodeConfig, Figures], tmp_path: Path
) -> None:
    config, figures = simulated
    manifest = DatasetFolder(Store(config.output.url)).manifest()
    assert [shard.id for shard in manifest.shards] == [f"{number:05d}" for number in range(SHARDS)]
    assert manifest.counts.samples == SHARDS * 107
    assert manifest.rejections == {"upstream_failed": SHARDS * 3}
    assert len(list(Path(config.output.url).glob("shards/*.tar"))) == SHARDS
    assert figures.values["shards/s"] > 0
    assert figures.values["driver CPU per shard, ms"] > 0
    figures.show("test", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text())["values"].keys() == figures.values.keys()


def test_time_changes_the_rate_and_not_the_dataset(simulated: tuple[EncodeConfig, Figures], tmp_path: Path) -> None:
    """One VAE per actor: two actors that hold it 0.2 s a shard end at most ten shards a second."""
    config = simulated_config(str(tmp_path))
    make_source(config, SHARDS)
    load = ShardLoad(lead_seconds=0.1, encode_seconds=0.2)
    figures = simulate(config, load, actors=2, request_seconds=0.02)
    assert figures.values["start to first commit, s"] > 0.36
    assert figures.values["shards/s"] > 0
    span = (SHARDS - 4) / 10.0  # the four that run at the start may end together
    assert figures.values["run, s"] > span
    assert manifest_bytes(config) == manifest_bytes(simulated[0])


def test_resume_reads_receipts_or_packs(s3_server: S3Server, tmp_path: Path) -> None:
    """On S3 as on disk; the requests per shard of a planning are those that docs/scaling.md counts."""
    shards = 150
    with proxy_to(s3_server) as proxy:
        config = simulated_config(f"{s3_server.url}/resume", proxy.options["endpoint_url"])
        make_source(config, shards)
        proxy.heads.clear()
        figures = measure_resume(config, ShardLoad())
    reads = [head for head in proxy.heads if head.startswith("GET ") and "/receipts/0" in head.split()[1]]
    assert len(reads) == shards, "the first planning reads each, the manifest comes from the pack"
    on_disk = simulated_config(str(tmp_path))
    make_source(on_disk, shards)
    assert figures.values.keys() == measure_resume(on_disk, ShardLoad()).values.keys()


def snapshots(*progress: tuple[float, int, bool]) -> list[Snapshot]:
    return [Snapshot(moment, shards, {"actors": 1.0} if alive else {}, 0.0) for moment, shards, alive in progress]


def test_steady_state_leaves_out_the_start_and_the_end() -> None:
    meter = ProcessMeter()
    working = [(50, 1, True), (51, 9, True), (52, 12, True), (60, 90, True)]
    meter.samples = snapshots((0, 0, False), *working, (61, 100, False))
    first, last = meter.steady()
    assert (first.shards, last.shards) == (12, 90)


def test_a_short_run_is_measured_from_its_first_commit() -> None:
    meter = ProcessMeter()
    meter.samples = snapshots((0, 0, False), (50, 1, True), (51, 20, False))
    first, last = meter.steady()
    assert (first.shards, last.shards) == (1, 20)


def test_what_is_sampled_is_this_process() -> None:
    with ProcessMeter() as meter:
        for _ in range(20):
            meter.committed()
        meter.sample()
    assert [sample.shards for sample in meter.samples] == [1, 20]
    assert meter.samples[-1].cpu_seconds["driver"] >= meter.samples[0].cpu_seconds["driver"] > 0
    assert meter.samples[-1].driver_mib > 10
