"""Export a dataset into the format of another project's reader, or go on with an export that was stopped.

latents export data/demo/latents --format mds --to data/demo/mds
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.messages import report_errors
from pipeline.errors import ConfigError
from pipeline.export import EXPORTS, ExportSettings, export_dataset
from pipeline.storage import Store


def export(
    dataset: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    format_name: Annotated[str, typer.Option("--format", help=f"One of: {', '.join(sorted(EXPORTS))}.")],
    to: Annotated[str, typer.Option("--to", help="A folder or any fsspec URL, for this export alone.")],
    without_logvar: Annotated[bool, typer.Option("--without-logvar", help="Leave stored log variances out.")] = False,
    part: Annotated[str, typer.Option(help="I/N: the I-th of N parts, so that N machines share the work.")] = "1/1",
    single_writer: Annotated[
        bool, typer.Option("--single-writer", help="For a store without conditional writes: no other export runs.")
    ] = False,
) -> None:
    """Export a dataset for MosaicML Streaming and LitData (mds) or FastVideo; run again to go on."""
    with report_errors():
        settings = ExportSettings(format=format_name, with_logvar=not without_logvar, part=_part(part))
        finished = run_export(Store(dataset), Store(to, single_driver=single_writer), settings)
    raise typer.Exit(0 if finished else 3)


def run_export(source: Store, target: Store, settings: ExportSettings) -> bool:
    """Export and print what came of it; False if other parts are not there yet."""
    console = Console(highlight=False)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("exporting", total=None)
        report = export_dataset(
            source,
            target,
            settings,
            on_shard=lambda done, total: progress.update(bar, completed=done, total=total),
        )
    before = f", {report.shards_found_done} shards were there" if report.shards_found_done else ""
    console.print(
        f"exported and read back: {report.shards} shards, {report.windows} windows, {report.bytes:,} bytes{before}",
        soft_wrap=True,
    )
    if report.finished:
        console.print(f"[green]finished[/]: {target.full_url('')} has the whole dataset", soft_wrap=True)
    else:
        console.print("[yellow]other parts are missing[/]: the one that ends last writes the index", soft_wrap=True)
    return report.finished


def _part(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None:
        raise ConfigError(f"--part: expected I/N such as 1/4, got {text!r}")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    typer.run(export)
