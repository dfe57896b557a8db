"""Check a dataset: receipts, checksums, counts, schema, index offsets; with --source also the pairing.

latents verify data/demo/latents --source
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.messages import report_errors
from pipeline.dataset import DatasetFolder
from pipeline.recorded import recorded_source
from pipeline.storage import Store
from pipeline.verify import VerifyReport, verify_dataset

SHOWN_PROBLEMS = 20
REPAIR = "To encode the damaged shards again: latents repair"


def verify(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    source: Annotated[
        bool, typer.Option("--source", help="Also read the source again and recompute the pairing hashes.")
    ] = False,
) -> None:
    """Check a dataset; exit code 0 means that all of it is as it should be."""
    with report_errors():
        report = run_verify(output, with_source=source)
    raise typer.Exit(0 if report.good else 1)


def run_verify(output: str, *, with_source: bool) -> VerifyReport:
    """Verify and print what was found."""
    console = Console(highlight=False)
    store = Store(output)
    spec = recorded_source(DatasetFolder(store).run_file()) if with_source else None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("verifying", total=None)
        report = verify_dataset(
            store, source=spec, on_shard=lambda done, total: progress.update(bar, completed=done, total=total)
        )
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.print("[red]problem:[/]", end=" ")
        console.print(problem, markup=False, soft_wrap=True)
    if len(report.problems) > SHOWN_PROBLEMS:
        console.print(f"... and {len(report.problems) - SHOWN_PROBLEMS} more")
    if report.to_encode:
        console.print(f"{REPAIR} {output}", markup=False, soft_wrap=True)
    if report.set_aside:
        console.print(f"[yellow]set aside, not in the dataset:[/] {', '.join(report.set_aside)}")
    looked_at = f"{report.shards} shards, {report.windows} windows, {report.payload_bytes:,} bytes"
    if with_source:
        looked_at += f", {report.source_clips} source clips"
    verdict = "[green]verified[/]" if report.good else f"[bold red]{len(report.problems)} problems[/]"
    console.print(f"{verdict}: {looked_at} in {store.full_url('')}", soft_wrap=True)
    return report


if __name__ == "__main__":
    typer.run(verify)
