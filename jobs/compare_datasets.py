"""What differs between two datasets: identity, windows, rows, rejections, numbers.

    latents diff data/demo/latents data/other/latents

Exit code 0: the same data, within --tolerance. 1: they differ. 2: one of them cannot be read.
"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from jobs.messages import report_errors
from pipeline.compare import NAMES, Counted, DatasetComparison, compare_datasets
from pipeline.dataset import DatasetFolder
from pipeline.storage import Store


def diff(
    a: Annotated[str, typer.Argument(help="A dataset: a folder or any fsspec URL.")],
    b: Annotated[str, typer.Argument(help="The other.")],
    tolerance: Annotated[
        float, typer.Option(min=0, help="Values that differ by no more count as the same (other numerics).")
    ] = 0.0,
) -> None:
    """What differs between two datasets; exit code 1 if their data does."""
    with report_errors(code=2):
        found = compare_datasets(DatasetFolder(Store(a)), DatasetFolder(Store(b)))
    print_comparison(found, tolerance)
    raise typer.Exit(0 if found.same_data(tolerance) else 1)


def print_comparison(found: DatasetComparison, tolerance: float) -> None:
    console = Console(highlight=False)
    for line in found.identity:
        console.print(f"identity: {line}", markup=False, soft_wrap=True)
    for name, windows, rejections in zip(NAMES, found.only, found.rejections, strict=True):
        _print_counted(console, f"windows only in {name}", windows)
        _print_counted(console, f"rejections only in {name}", rejections)
    _print_counted(console, "windows with other rows", found.other_rows)
    numbers = found.numbers
    if numbers.windows:
        console.print(
            f"numbers: {numbers.windows} tensors read, {numbers.equal} equal, largest difference "
            f"{numbers.largest:.3g}, RMS {numbers.rms:.3g} ({numbers.relative_rms:.2%} of A's)",
            soft_wrap=True,
        )
    for largest, key in numbers.worst:
        console.print(f"  {key}: {largest:.3g}", markup=False)
    console.print(
        f"{found.shards_equal} shards with equal bytes ({found.windows_equal} windows), {found.shards_read} read"
    )
    console.print("[green]the same data[/]" if found.same_data(tolerance) else "[bold red]they differ[/]")


def _print_counted(console: Console, title: str, counted: Counted) -> None:
    if counted.number:
        more = ", ..." if counted.number > len(counted.first) else ""
        console.print(f"{title}: {counted.number}: {', '.join(counted.first)}{more}", markup=False, soft_wrap=True)
