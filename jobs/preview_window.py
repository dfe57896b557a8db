"""Look at windows: their source frames beside what their stored latents decode to, with the PSNR.

    latents preview data/demo/latents 000000000_00000
    latents preview data/demo/latents 000000000_00000 --output look.png
    latents preview data/demo/latents                     # some windows, one below the other: preview.png

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
from jobs.evaluate_vae import open_device
from jobs.messages import report_errors
from jobs.side_by_side import write_picture, write_video
from pipeline.checkpoints import load_source
from pipeline.dataset import DatasetFolder, index_name
from pipeline.decode.pool import DecodePool
from pipeline.decode_back import DecodeBack, WindowPair, find_window
from pipeline.errors import ConfigError, DatasetError
from pipeline.formats import read_index
from pipeline.recorded import recorded_decoding, recorded_source, recorded_vae
from pipeline.sources import SourceSpec
from pipeline.storage import Store

VAE_HELP = "Checkpoint (path or URL) or named spec to decode with; without it the one in run.json."
SOURCE_HELP = "Where the source lies now: source.urls of tars, source.url of a table. Without it, as run.json says."
DEVICE_HELP = "Where the VAE runs: cpu, cuda, cuda:1."
SUFFIXES = (".mp4", ".gif", ".webp", ".png")
SHOWN_CLIPS = 3


def preview(
    output: Annotated[str, typer.Argument(help="The dataset: a folder or any fsspec URL.")],
    key: Annotated[
        str | None, typer.Argument(help="The window's key, such as 000000000_00000; without it the first clips.")
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option("--output", help="File to write: .mp4, .gif, .webp, or .png for a strip. Without it KEY.mp4."),
    ] = None,
    vae: Annotated[str | None, typer.Option(help=VAE_HELP)] = None,
    source: Annotated[str | None, typer.Option(help=SOURCE_HELP)] = None,
    device: Annotated[str, typer.Option(help=DEVICE_HELP)] = "cpu",
) -> None:
    """One window to look at: source beside decoded latents."""
    console = Console(highlight=False)
    with report_errors():
        path = to or Path("preview.png" if key is None else f"{key.replace('/', '_')}.mp4")
        suffixes = SUFFIXES if key is not None else (".png",)
        if path.suffix not in suffixes:
            raise ConfigError(f"--output: expected a file that ends with one of {', '.join(suffixes)}, got {path}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if key is None:
            pairs = read_first_windows(output, SHOWN_CLIPS, vae=vae, source=source, device=device)
        else:
            pairs = [read_window(output, key, vae=vae, source=source, device=device)]
        if path.suffix == ".png":
            write_picture(path, pairs)
        else:
            write_video(path, pairs[0])
        for pair in pairs:
            _print_figures(console, pair)
        console.print(str(path), soft_wrap=True)


def _print_figures(console: Console, pair: WindowPair) -> None:
    row = pair.row
    similarity = "" if pair.ssim is None else f", SSIM {pair.ssim:.4f}"
    text = f"{row.key}: {row.num_frames} frames of {row.height} x {row.width}, caption {row.caption!r}"
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"PSNR {pair.psnr:.2f} dB (lowest frame {min(pair.psnr_T):.2f}){similarity}")


def read_window(
    output: str, key: str, *, vae: str | None = None, source: str | None = None, device: str = "cpu"
) -> WindowPair:
    """One window of a dataset. PipelineErrors if there is none, or its source or VAE is not to be had."""
    dataset = DatasetFolder(Store(output))
    shard_id, row = find_window(dataset, key)
    with opened(dataset, vae=vae, source=source, device=device) as back:
        (pair,) = back.pairs(shard_id, [row])
    return pair


def read_first_windows(
    output: str, number: int, *, vae: str | None = None, source: str | None = None, device: str = "cpu"
) -> list[WindowPair]:
    """The first window of up to `number` clips, of the first shard that has any. DatasetError if none has."""
    dataset = DatasetFolder(Store(output))
    for shard_id in dataset.receipt_ids():
        with dataset.open_seekable(index_name(shard_id)) as file:
            firsts = [row for row in read_index(file).rows if row.row.window_index == 0][:number]
        if firsts:
            with opened(dataset, vae=vae, source=source, device=device) as back:
                return list(back.pairs(shard_id, firsts))
    raise DatasetError(f"{dataset.store.full_url('')}: no committed shard holds a window")


@contextmanager
def opened(
    dataset: DatasetFolder,
    *,
    vae: str | None = None,
    source: str | None = None,
    children: int = 1,
    device: str = "cpu",
) -> Iterator[DecodeBack]:
    """The dataset with its VAE loaded and decode processes up. Options as on the command line."""
    target = open_device(device)
    run = dataset.run_file()
    network = recorded_vae(run) if vae is None else load_source(vae_named(vae))
    with DecodePool(recorded_decoding(run), children) as pool:
        yield DecodeBack(
            dataset, network.to(target), pool, source=moved_source(recorded_source(run), source) if source else None
        )


def moved_source(spec: SourceSpec, place: str) -> SourceSpec:
    """The same source in another place."""
    name = "urls" if spec.kind == "webdataset" else "url"
    return type(spec).model_validate({**spec.model_dump(), name: place})
