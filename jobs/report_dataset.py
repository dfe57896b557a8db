"""One HTML page about a dataset, to look at before training on it.

    latents report data/demo/latents
    latents report s3://bucket/latents --output report.html --windows 32

Some windows of every bucket are decoded and shown beside their source, which is read again for that. Everything else
comes from the dataset's own documents. The page needs nothing beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from jobs.dataset_report.facts import gather
from jobs.dataset_report.looked_at import BucketLooks, choose_windows, look_at
from jobs.dataset_report.page import page_body
from jobs.messages import report_errors
from jobs.preview_window import DEVICE_HELP, SOURCE_HELP, VAE_HELP, opened
from jobs.web_page import write_document
from pipeline.dataset import DatasetFolder
from pipeline.storage import Store


def report(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    to: Annotated[Path, typer.Option("--output", help="The page to write.")] = Path("report.html"),
    windows: Annotated[int, typer.Option(min=0, help="Windows of each bucket to decode; 0: none.")] = 8,
    vae: Annotated[str | None, typer.Option(help=VAE_HELP)] = None,
    source: Annotated[str | None, typer.Option(help=SOURCE_HELP)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
    decode_children: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 1,
) -> None:
    """One self-contained page: pictures, quality, latents, seams, rejections, throughput, identity."""
    console = Console(highlight=False)
    with report_errors():
        path = run_report(
            output, to, windows=windows, vae=vae, source=source, children=decode_children, device=device
        )
        console.print(f"{path}: {path.stat().st_size:,} bytes", soft_wrap=True)


def run_report(
    output: str,
    path: Path,
    *,
    windows: int,
    vae: str | None = None,
    source: str | None = None,
    children: int = 1,
    device: str = "cpu",
) -> Path:
    """Write the page. PipelineErrors if it is no dataset, or its VAE is not to be had; a source that cannot be read
    is a note on the page."""
    dataset = DatasetFolder(Store(output))
    facts = gather(dataset)
    chosen = choose_windows(dataset, facts.manifest, windows)
    buckets: list[BucketLooks] = []
    total = sum(map(len, chosen.values()))
    if total:
        with (
            opened(dataset, vae=vae, source=source, children=children, device=device) as back,
            Progress(transient=True) as progress,
        ):
            bar = progress.add_task("decoding", total=total)
            buckets = look_at(back, facts.manifest, chosen, facts.notes, lambda: progress.advance(bar))
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_document(path, f"Video latents: {facts.url}", page_body(facts, buckets))
