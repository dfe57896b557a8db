"""What the driver, Ray and the store spend per shard, with the VAE and the decoders replaced by their time.

    python jobs/simulate.py run --shards 10000 --actors 32
    python jobs/simulate.py run --shards 10000 --actors 32 --lead-seconds 1 --encode-seconds 3
    python jobs/simulate.py resume --receipts 100000

Planning, Ray Data's scheduling, attempts, commits, receipts and the manifest are the product's own code on a real
store; only an actor's work on a shard is a sleep (`simulate_runner.py`). With no seconds to sleep, the rate is the
highest that this machine can schedule. docs/scaling.md says what follows from the figures.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import typer
from rich.console import Console
from rich.table import Table

from jobs.cluster import connected, node_resources
from jobs.config import EncodeConfig
from jobs.messages import report_errors
from jobs.simulate_meter import ProcessMeter
from jobs.simulate_runner import DistantStore, ShardLoad, content_of, receipt_of, set_up_of
from pipeline.dataflow import ActorShape, run_shards
from pipeline.dataset import DatasetFolder, index_name, receipt_name, shard_name
from pipeline.documents import StoredObject
from pipeline.run import RunLog, RunPlan, commit_all, finish_run, plan_run
from pipeline.status import StatusReader
from pipeline.storage import Store

WRITERS = 32
Output = Annotated[str | None, typer.Option(help="A new folder or s3:// prefix; default: a temporary folder.")]
Endpoint = Annotated[str | None, typer.Option(help="endpoint_url of an S3-compatible store.")]
FiguresPath = Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")]
app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)


@dataclass(slots=True)
class Figures:
    """What was measured: seconds and per-shard milliseconds, by name."""

    setting: dict[str, Any]
    values: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Wall and processor seconds of this process for the body."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        self.values[f"{name}, s"] = time.monotonic() - wall
        self.values[f"{name}, driver CPU s"] = time.process_time() - cpu

    def show(self, title: str, path: Path | None) -> None:
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in self.values.items():
            table.add_row(name, f"{value:,.0f}" if value >= 1000 else f"{value:.3g}")
        Console().print(table)
        if path is not None:
            path.write_text(json.dumps(asdict(self), indent=2) + "\n")


@app.command()
def run(
    shards: Annotated[int, typer.Option(min=20)] = 10_000,
    actors: Annotated[int, typer.Option(min=1)] = 16,
    lead_seconds: Annotated[float, typer.Option(min=0, help="Read and decode before a shard's encoding.")] = 0.0,
    encode_seconds: Annotated[float, typer.Option(min=0, help="Time a shard holds the VAE.")] = 0.0,
    clips: Annotated[int, typer.Option(min=1, help="Clips per shard, for the receipt's counts.")] = 107,
    request_ms: Annotated[float, typer.Option(min=0, help="Added to every request to the output's store.")] = 0.0,
    output: Output = None,
    endpoint: Endpoint = None,
    figures_path: FiguresPath = None,
) -> None:
    """The whole dataflow over many small shards."""
    load = ShardLoad(lead_seconds=lead_seconds, encode_seconds=encode_seconds, clips=clips)
    with report_errors(), _place(output) as place:
        config = simulated_config(place, endpoint)
        make_source(config, shards)
        figures = simulate(config, load, actors, request_seconds=request_ms / 1e3)
    figures.show(f"{shards} shards, {actors} actors on {os.cpu_count()} cores", figures_path)


@app.command()
def resume(
    receipts: Annotated[int, typer.Option(min=1)] = 100_000,
    failed_clips: Annotated[int, typer.Option(min=0, help="Rejections per receipt.")] = 3,
    output: Output = None,
    endpoint: Endpoint = None,
    figures_path: FiguresPath = None,
) -> None:
    """Planning over a source and a dataset with many committed shards, its status, and the manifest of them."""
    with report_errors(), _place(output) as place:
        config = simulated_config(place, endpoint)
        make_source(config, receipts)
        figures = measure_resume(config, ShardLoad(failed_clips=failed_clips))
    figures.show(f"resume over {receipts} receipts", figures_path)


def simulated_config(place: str, endpoint: str | None = None) -> EncodeConfig:
    """A config whose source and output lie under `place`."""
    options = {"endpoint_url": endpoint} if endpoint else {}
    return EncodeConfig.model_validate(
        {
            "source": {"kind": "webdataset", "urls": f"{place}/source", "options": options},
            "output": {"url": f"{place}/latents", "options": options},
            "vae": {"spec": "cvvae-sd21-tiny"},
            "resize": {"buckets": [[256, 256]]},
        }
    )


def make_source(config: EncodeConfig, shards: int) -> None:
    """Objects named as tars: a listing is all that planning sees of them."""
    assert config.source.kind == "webdataset"
    assert isinstance(config.source.urls, str)
    store = Store(config.source.urls, options=config.source.options)
    width = max(5, len(str(shards - 1)))
    _write_all(store, ((f"{number:0{width}d}.tar", b"tar") for number in range(shards)))


def simulate(config: EncodeConfig, load: ShardLoad, actors: int, *, request_seconds: float = 0.0) -> Figures:
    """Plan, run, commit and finish, each as the encode job does it."""
    setting = {"actors": actors, "cores": os.cpu_count(), "request_seconds": request_seconds, **asdict(load)}
    figures = Figures(setting)
    with figures.timed("plan"):
        plan = plan_run(config, config.model_dump(mode="json"))
    if request_seconds:
        plan = replace(plan, dataset=DatasetFolder(DistantStore(plan.dataset.store, request_seconds)))
    log, meter = RunLog(), ProcessMeter()
    with connected(config.cluster), meter, figures.timed("run"):
        _run_and_commit(plan, load, _shape(actors), log, meter)
    _steady_figures(figures, meter)
    with figures.timed("manifest"):
        manifest = finish_run(plan, log)
    figures.values["manifest, bytes per shard"] = len(manifest.to_bytes()) / len(plan.shards)
    assert len(manifest.shards) == len(plan.shards) == meter.shards, "every shard is in the manifest, once"
    with figures.timed("plan again, nothing left"):
        assert not plan_run(config, config.model_dump(mode="json")).todo
    return figures


def _shape(actors: int) -> ActorShape:
    """Light actors share the cores, whatever their number."""
    cores = sum(node.get("CPU", 0.0) for node in node_resources())
    share = math.floor(cores / actors * 1e4) / 1e4  # Ray counts in ten-thousandths
    return ActorShape(num_actors=actors, num_gpus=0, decode_children=1, encode_threads=1, num_cpus=min(1.0, share))


def _run_and_commit(plan: RunPlan, load: ShardLoad, shape: ActorShape, log: RunLog, meter: ProcessMeter) -> None:
    outcomes = run_shards(list(plan.todo), set_up_of(plan.job(), load), shape, on_progress=lambda _: None)
    with closing(outcomes):
        for _ in commit_all(plan, outcomes, log, set_aside_poison=False):
            meter.committed()
        meter.sample()


def _steady_figures(figures: Figures, meter: ProcessMeter) -> None:
    first, last = meter.steady()
    shards, seconds = last.shards - first.shards, last.monotonic - first.monotonic
    assert meter.first_commit is not None, "something was committed"
    values = figures.values
    values["start to first commit, s"] = meter.first_commit - meter.started
    values["shards/s"] = shards / seconds
    for kind, cpu in sorted(last.cpu_seconds.items()):
        values[f"{kind} CPU per shard, ms"] = (cpu - first.cpu_seconds.get(kind, 0.0)) / shards * 1e3
    if meter.actor_mib is not None:
        values["actor memory (PSS), MiB"] = meter.actor_mib
    values["driver memory at a tenth, MiB"] = first.driver_mib
    values["driver memory at the end, MiB"] = last.driver_mib
    values["driver memory growth per shard, KiB"] = (last.driver_mib - first.driver_mib) * 1024 / shards


def measure_resume(config: EncodeConfig, load: ShardLoad) -> Figures:
    """Write a receipt for every shard of the source, then plan and finish."""
    figures = Figures(asdict(load))
    with figures.timed("plan, no receipts"):
        plan = plan_run(config, config.model_dump(mode="json"))
    fingerprint, size = plan.run_file.fingerprint, 0

    def documents() -> Iterator[tuple[str, bytes]]:
        nonlocal size
        for shard in plan.shards:
            names = shard_name(shard.id, ".tar"), index_name(shard.id)
            payload, index = (StoredObject(path=n, size=64, sha256=content_of(n, 32).hex()) for n in names)
            content = receipt_of(shard, fingerprint, load, payload, index).to_bytes()
            size += len(content)
            yield receipt_name(shard.id), content

    _write_all(plan.dataset.store, documents())
    figures.values["receipt, bytes"] = size / len(plan.shards)
    before = _peak_mib()
    with figures.timed("plan, all committed"):
        again = plan_run(config, config.model_dump(mode="json"))
    assert not again.todo
    figures.values["plan, memory, MiB"] = _peak_mib() - before
    with figures.timed("plan, receipts in packs where the store has them"):
        assert not plan_run(config, config.model_dump(mode="json")).todo
    _measure_status(again, figures)
    before = _peak_mib()
    with figures.timed("manifest"):
        manifest = finish_run(again, RunLog())
    figures.values["manifest, memory, MiB"] = _peak_mib() - before
    figures.values["manifest, bytes per shard"] = len(manifest.to_bytes()) / len(plan.shards)
    return figures


def _measure_status(plan: RunPlan, figures: Figures) -> None:
    """`latents status --watch` of a run under way: the first look reads every receipt, the next one lists them."""
    reader = StatusReader(plan.dataset.store)
    for look in ("status, first look", "status, next look"):
        with figures.timed(look):
            seen = reader.read()
        assert (seen.done, seen.finished) == (len(plan.shards), False)


def _write_all(store: Store, objects: Iterator[tuple[str, bytes]]) -> None:
    """Create small objects; on a local disk without the sync of each that a commit pays for."""
    if store.is_local:
        for name, content in objects:
            path = Path(store.path(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return
    with ThreadPoolExecutor(WRITERS) as pool:
        for _ in pool.map(lambda pair: store.create(*pair), objects):
            pass


@contextmanager
def _place(output: str | None) -> Iterator[str]:
    if output is not None:
        yield output
        return
    with tempfile.TemporaryDirectory(prefix="simulate-") as folder:
        yield folder


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    app()
