"""What a run will give and cost, before it is started: a sample of its real clips, encoded on the hardware at hand.

latents plan configs/encode/webvid_256.yaml --gpus 8 --gpus 64 --price 2.5
"""

from __future__ import annotations

import math
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.cluster import decide_shape
from jobs.config import EncodeConfig, load_config
from jobs.console import shown
from jobs.messages import report_errors
from pipeline.checkpoints import load_source
from pipeline.dataflow import ActorShape
from pipeline.planning.census import take_census
from pipeline.planning.compare import PLAN
from pipeline.planning.estimate import EncodePlan, EncoderShape, make_plan
from pipeline.planning.sample import take_sample
from pipeline.run import check_geometry
from pipeline.sources import plan_source
from pipeline.storage import Store

CLUSTERS = (1, 8, 64)


def plan(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/encode/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.setting=value (YAML).")
    ] = None,
    clips: Annotated[int, typer.Option(min=4, help="Samples to try, about.")] = 64,
    seconds: Annotated[float, typer.Option(min=1, help="Stop sampling after this long.")] = 300.0,
    gpus: Annotated[list[int] | None, typer.Option(min=1, help="Encoders to give times for; repeatable.")] = None,
    price: Annotated[float | None, typer.Option(min=0, help="Of one encoder for an hour, in any currency.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where to write; default: plan.json in output.url.")] = None,
) -> None:
    """Estimate a run's output, time and price from a sample of its clips; writes plan.json."""
    with report_errors():
        settings = load_config(EncodeConfig, config, overrides or ())
        planned = run_plan(settings, clips=clips, seconds=seconds, encoders=gpus or (), price=price)
        if output is not None:
            output.write_bytes(planned.to_bytes())
            where = str(output)
        else:
            store = Store(
                settings.output.url, options=settings.output.options, single_driver=settings.output.single_driver
            )
            store.replace(PLAN, planned.to_bytes())
            where = store.full_url(PLAN)
    console = Console(highlight=False)
    for table in plan_tables(planned):
        console.print(table)
    for advice in decode_advice(planned):
        console.print(advice, soft_wrap=True)
    console.print(f"plan: {where}", soft_wrap=True)


def run_plan(
    config: EncodeConfig,
    *,
    clips: int,
    seconds: float,
    encoders: tuple[int, ...] | list[int] = (),
    price: float | None = None,
) -> EncodePlan:
    """Count, sample, estimate. Errors as `plan_run`; the output is not touched."""
    vae = load_source(config.vae)
    check_geometry(vae.spec, config)
    shards = plan_source(config.source).shards
    census = take_census(shards, config.source)
    shape = _shape_here(config, len(shards))
    device = torch.device("cuda" if shape.num_gpus else "cpu")
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("encoding a sample", total=None)
        sample = take_sample(
            config,
            shards,
            vae,
            device,
            threads=None if shape.num_gpus else shape.encode_threads,
            clips=clips,
            max_seconds=seconds,
            on_group=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    threads = 0 if shape.num_gpus else shape.encode_threads
    remote = shape.remote_decoders
    each = EncoderShape(
        decode_children=shape.decode_children + remote,
        encode_threads=threads,
        cores=shape.num_cpus + remote * config.decode.threads,
    )
    sizes = sorted({shape.num_actors, *(encoders or CLUSTERS)})
    return make_plan(shards, census, sample, each, encoders=sizes, price_per_hour=price)


def _shape_here(config: EncodeConfig, num_shards: int) -> ActorShape:
    """The actors that a run on this machine alone would have. ConfigError if it has no room for one."""
    gpus = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return decide_shape(config.cluster, config.encode, [{"CPU": float(cores), "GPU": float(gpus)}], num_shards)


def plan_tables(planned: EncodePlan) -> list[Table]:
    """The plan for people."""
    return [_what(planned), _speed(planned), _bytes(planned), _time(planned)]


def decode_advice(planned: EncodePlan) -> list[str]:
    """A line if a GPU would wait for its decode processes. Without GPUs it is more encoders that need more nodes."""
    needed = planned.decode_cores_per_encoder.value
    missing = math.ceil(needed - planned.decode_children)
    if planned.device.startswith("cpu") or missing <= 0:
        return []
    return [
        f"An encoder needs {needed:.1f} decode cores and has {planned.decode_children}: it will wait for decoding. "
        f"Raise cluster.decode_children if its node has {missing} more cores for it, or lend it other nodes' cores: "
        f"--set cluster.remote_decoders={missing} (docs/operations.md)."
    ]


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=bool(columns))
    for column in columns:
        table.add_column(column)
    return table


def _what(planned: EncodePlan) -> Table:
    table = _table(f"what will come (from {planned.sampled_samples} samples; in brackets nine times out of ten)")
    totals = planned.totals
    table.add_row("samples", f"{shown(planned.samples)} in {planned.shards} shards")
    table.add_row("clips encoded", shown(totals["clips"]))
    table.add_row("windows", shown(totals["windows"]))
    for name, estimate in planned.buckets.items():
        table.add_row(f"  {name}", shown(estimate))
    table.add_row("hours of video", shown(totals["video seconds"].times(1 / 3600)))
    for name, estimate in planned.rejections.items():
        table.add_row(f"rejected {name}", shown(estimate))
    table.add_row("any other class", f"at most {planned.unseen_class_share:.1%} of the samples")
    return table


def _speed(planned: EncodePlan) -> Table:
    table = _table(f"speed here ({planned.device})")
    table.add_row("an encoder", f"{shown(planned.encoder_frames_per_second)} stored frames/s")
    table.add_row("a decode core", f"{shown(planned.decode_frames_per_second)} decoded frames/s")
    table.add_row("decode cores per encoder", f"{shown(planned.decode_cores_per_encoder)} keep both busy")
    return table


def _bytes(planned: EncodePlan) -> Table:
    table = _table("payload bytes", "stored", "bytes")
    for name, estimate in planned.storage_bytes.items():
        table.add_row(name, shown(estimate))
    table.add_row("[bold]this config[/]", shown(planned.totals["payload bytes"]))
    return table


def _time(planned: EncodePlan) -> Table:
    title = f"time, with {planned.decode_children} decode processes per encoder, start-up not counted"
    table = _table(title, "encoders", "wall time", "encoder hours", "price")
    for wall in planned.walls:
        seconds = wall.seconds
        low, best, high = (timedelta(seconds=round(each)) for each in (seconds.low, seconds.value, seconds.high))
        price = "" if wall.price is None else shown(wall.price)
        table.add_row(str(wall.encoders), f"{best} ({low} to {high})", shown(wall.encoder_hours), price)
    if planned.num_slow_shards:
        named = ", ".join(f"{name} ({seconds / 60:.0f} min)" for name, seconds in planned.slow_shards[:5])
        table.caption = f"{planned.num_slow_shards} shards take over ten minutes, the slowest: {named}"
    else:
        table.caption = f"no shard takes over ten minutes; the slowest {planned.longest_shard_seconds:.1f} s"
    return table


if __name__ == "__main__":
    typer.run(plan)
