"""How far a dataset is, from its store alone: no cluster, no Ray.

latents status s3://bucket/latents --watch
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.messages import report_errors
from pipeline.status import DatasetStatus, StatusReader
from pipeline.storage import Store


def status(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    watch: Annotated[bool, typer.Option("--watch", help="Look again until the run has ended.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between looks.")] = 10.0,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON per look.")] = False,
) -> None:
    """How far a run is: done, left, rejected, rate, time left, slow shards. Reads the store and nothing else."""
    console = Console(highlight=False)
    with report_errors():
        looks = _looks(StatusReader(Store(output)), every if watch else None)
        if as_json:
            for look in looks:
                print(json.dumps(as_record(look)), flush=True)
        elif watch and console.is_terminal:
            with Live(console=console, auto_refresh=False) as live:
                for look in looks:
                    live.update(status_table(look), refresh=True)
        else:
            for look in looks:
                console.print(status_table(look))


def _looks(reader: StatusReader, every: float | None) -> Iterator[DatasetStatus]:
    """One look, or one every so many seconds until the run has ended or its driver is gone."""
    while True:
        look = reader.read()
        yield look
        if every is None or look.finished or look.run is None or not look.run.is_running:
            return
        time.sleep(every)


def as_record(look: DatasetStatus) -> dict[str, Any]:
    """The look as plain JSON values."""
    rate = look.rate
    return {
        "url": look.url,
        "unix": round(look.now_unix, 3),
        "fingerprint": look.run_file.fingerprint,
        "finished": look.finished,
        "shards": {"total": look.total, "done": look.done, "left": look.left},
        "counts": look.counts.model_dump(),
        "rejections": look.rejections,
        "payload_bytes": look.payload_bytes,
        "windows_not_proven": look.windows_not_proven,
        "rate": None if rate is None else asdict(rate),
        "eta_seconds": look.eta_seconds,
        "last_receipt_seconds": look.last_receipt_seconds,
        "driver_silent_seconds": look.driver_silent_seconds,
        "run": None if look.run is None else look.run.model_dump(),
    }


def status_table(look: DatasetStatus) -> Table:
    """The look for people."""
    table = Table(title=look.url, show_header=False, title_justify="left")
    total = "an unknown number of" if look.total is None else str(look.total)
    table.add_row("shards", f"{look.done} of {total} done" + ("" if look.left is None else f", {look.left} left"))
    table.add_row("state", _state(look))
    counts = look.counts
    table.add_row("clips encoded", f"{counts.clips_encoded} of {counts.samples} samples")
    table.add_row("windows stored", f"{counts.windows_stored}, {look.payload_bytes:,} bytes")
    for name, number in look.rejections.items():
        table.add_row(f"rejected {name}", f"{number}{_share(number, counts.samples)}")
    if look.windows_not_proven:
        table.add_row("tile proof", f"[yellow]not proven: out of memory: {look.windows_not_proven} windows[/]")
    if look.rate is not None:
        rate = look.rate
        per_minute, frames = 60 * rate.shards / rate.seconds, rate.frames / rate.seconds
        shown = f"{per_minute:.3g} shards a minute" + (f", {frames:.3g} frames/s" if rate.frames else "")
        table.add_row("rate", f"{shown}, over the last {_span(rate.seconds)}")
    if look.eta_seconds is not None:
        table.add_row("time left", f"about {_span(look.eta_seconds)}")
    if look.last_receipt_seconds is not None:
        table.add_row("last receipt", f"{_span(look.last_receipt_seconds)} ago")
    if look.run is not None:
        for title, shards in (("longest in work", look.run.under_way), ("slowest shard", look.run.slowest_shards)):
            for name, seconds in shards[:5]:
                table.add_row(title, f"{name}: {_span(seconds)}")
    return table


def _state(look: DatasetStatus) -> str:
    silent = look.driver_silent_seconds
    if look.finished:
        return "[green]finished[/]"
    if look.run is None:
        return "no run has reported yet"
    if silent is not None:
        return (
            f"[red]the driver on {look.run.driver_host} has been silent for {_span(silent)}[/]: it is gone or cut "
            "off; start the same command again"
        )
    if look.run.is_running:
        return f"run {look.run.run_id} goes on, driver {look.run.driver_host}"
    return f"[yellow]the last run, {look.run.run_id}, ended: {look.run.outcome}[/]"


def _share(number: int, samples: int) -> str:
    return f" ({number / samples:.2%} of samples)" if samples else ""


def _span(seconds: float) -> str:
    """Days, hours and minutes; seconds where they matter."""
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


if __name__ == "__main__":
    typer.run(status)
