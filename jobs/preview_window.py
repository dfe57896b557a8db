"""Look at one window: its source frames beside what its stored latent decodes to, with the PSNR.

    latents preview data/demo/latents 000000000_00000
    latents preview data/demo/latents 000000000_00000 --output look.png

The VAE and the source are those that run.json names, unless --vae and --source say where they lie now.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.config import vae_named
from jobs.messages import report_errors
from jobs.side_by_side import write_picture, write_video
from pipeline.checkpoints import load_source
from pipeline.dataset import DatasetFolder
from pipeline.decode.pool import DecodePool
from pipeline.decode_back import DecodeBack, WindowPair, find_window
from pipeline.errors import ConfigError
from pipeline.recorded import recorded_decoding, recorded_source, recorded_vae
from pipeline.sources import SourceSpec
from pipeline.storage import Store

VAE_HELP = "Checkpoint (path or URL) or named spec to decode with; without it the one in run.json."
SOURCE_HELP = "Where the source lies now: source.urls of tars, source.url of a table. Without it, as run.json says."
SUFFIXES = (".mp4", ".gif", ".webp", ".png")


def preview(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    key: Annotated[str, typer.Argument(help="The window's key, such as 000000000_00000.")],
    to: Annotated[
        Path | None,
        typer.Option("--output", help="File to write: .mp4, .gif, .webp, or .png for a strip. Without it KEY.mp4."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help=VAE_HELP)] = None,
    source: Annotated[str | None, typer.Option(help=SOURCE_HELP)] = None,
) -> None:
    """One window to look at: source beside decoded latents."""
    console = Console(highlight=False)
    with report_errors():
        path = to or Path(f"{key.replace('/', '_')}.mp4")
        if path.suffix not in SUFFIXES:
            raise ConfigError(f"--output: expected a file that ends with one of {', '.join(SUFFIXES)}, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        pair = read_window(output, key, vae=vae, source=source)
        if path.suffix == ".png":
            write_picture(path, [pair])
        else:
            write_video(path, pair)
        row = pair.row
        similarity = "" if pair.ssim is None else f", SSIM {pair.ssim:.4f}"
        console.print(f"{row.key}: {row.num_frames} frames of {row.height} x {row.width}, caption {row.caption!r}")
        console.print(f"PSNR {pair.psnr:.2f} dB (lowest frame {min(pair.psnr_T):.2f}){similarity}")
        console.print(str(path), soft_wrap=True)


def read_window(output: str, key: str, *, vae: str | None = None, source: str | None = None) -> WindowPair:
    """One window of a dataset. PipelineErrors if there is none, or its source or VAE is not to be had."""
    dataset = DatasetFolder(Store(output))
    shard_id, row = find_window(dataset, key)
    with opened(dataset, vae=vae, source=source) as back:
        (pair,) = back.pairs(shard_id, [row])
    return pair


@contextmanager
def opened(
    dataset: DatasetFolder, *, vae: str | None = None, source: str | None = None, children: int = 1
) -> Iterator[DecodeBack]:
    """The dataset with its VAE loaded and decode processes up. `vae` and `source` as on the command line."""
    run = dataset.run_file()
    network = recorded_vae(run) if vae is None else load_source(vae_named(vae))
    with DecodePool(recorded_decoding(run), children) as pool:
        yield DecodeBack(
            dataset, network, pool, source=moved_source(recorded_source(run), source) if source else None
        )


def moved_source(spec: SourceSpec, place: str) -> SourceSpec:
    """The same source in another place."""
    name = "urls" if spec.kind == "webdataset" else "url"
    return type(spec).model_validate({**spec.model_dump(), name: place})
