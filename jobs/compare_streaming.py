"""Three ways to run a long clip through a video VAE: in one shot, in overlapping tiles, as a stream.

    python jobs/compare_streaming.py
    python jobs/compare_streaming.py --checkpoint ivvae.pth --frames 49 --size 1024 --dtype bf16 --device cuda

This is Table 7 of IV-VAE's paper (arXiv 2411.06449) for any model and size: time, peak memory, and how far the
numbers are from those of one shot (relative RMS). The paper's own, 49 x 1024 x 1024 in bf16 on an A800: one shot
12.7 s and 76.3 GB, overlapping tiles 14.7 s and 14.3 GB, cache 13.0 s and 14.1 GB.

`tiles of 1 + n` are encoded and decoded apart from each other and share one frame with the tile before; `stream, n`
hands the state of a chunk of n frames to the next one. Every measurement is a process of its own, so that memory is
that of one way only; the ways of a round run one after another, and times are medians over the rounds. On a busy CPU
set OMP_WAIT_POLICY=PASSIVE, or threads that wait for each other are what is measured. MiB is the peak above the
loaded model, input and output included. Without a checkpoint the weights are seeded: times and deviations mean
something then, PSNR does not.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import safetensors.torch
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cvvae import SPECS, VideoVAE, build_vae, load_vae, seeded_vae
from cvvae.metrics import psnr_of_videos, to_unit_range
from cvvae.streaming import apply_in_chunks, plan_chunks
from jobs.bench_report import peak_rss_mib, reset_peak_rss, return_free_memory, rss_mib
from jobs.measure_precision import difference, smooth_video

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, slots=True)
class Way:
    """How a clip is run. `frames` is the length of a chunk, or the distance from one tile to the next."""

    kind: Literal["one shot", "tiles", "stream"]
    frames: int | None = None

    def __str__(self) -> str:
        return {"one shot": "one shot", "tiles": f"tiles of 1 + {self.frames}", "stream": f"stream, {self.frames}"}[
            self.kind
        ]


@dataclass(frozen=True, slots=True)
class Model:
    """What a child process needs to make the model."""

    spec_name: str | None
    checkpoint: Path | None
    dtype: str
    device: str

    def load(self) -> VideoVAE:
        dtype = DTYPES[self.dtype]
        if self.checkpoint is not None:
            return load_vae(self.checkpoint, dtype=dtype, device=self.device)
        assert self.spec_name is not None
        return seeded_vae(SPECS[self.spec_name], 0).to(device=self.device, dtype=dtype)


@dataclass(frozen=True, slots=True)
class Figures:
    """One way's cost in one process. Memory is None where the system does not say."""

    encode_seconds: float
    decode_seconds: float
    peak_mib: float | None


def compare_streaming(
    spec: Annotated[list[str] | None, typer.Option(help="Named specs, with seeded weights.")] = None,
    checkpoint: Annotated[list[Path] | None, typer.Option(help="Files or folders that load_vae reads.")] = None,
    frames: Annotated[int, typer.Option(min=1, help="A length that the models take.")] = 49,
    size: Annotated[int, typer.Option(min=8, help="Height and width.")] = 64,
    chunk: Annotated[list[int] | None, typer.Option(min=1, help="Frames of a stream's chunk.")] = None,
    tile: Annotated[list[int] | None, typer.Option(min=1, help="Frames from one tile to the next.")] = None,
    dtype: Annotated[Literal["fp32", "bf16", "fp16"], typer.Option()] = "fp32",
    device: Annotated[str, typer.Option()] = "cpu",
    rounds: Annotated[int, typer.Option(min=1)] = 1,
) -> None:
    """Time, memory and deviation of one shot, overlapping tiles and streams."""
    ways = [Way("one shot")]
    ways += [Way("tiles", length) for length in tile or (16,)]
    ways += [Way("stream", length) for length in chunk or (4, 8, 16)]
    checkpoints = checkpoint or []
    names = spec if spec or checkpoints else ["ivvae-z4-tiny"]
    unknown = sorted(set(names or ()) - set(SPECS))
    if unknown:
        raise typer.BadParameter(f"expected names of SPECS, got {unknown}", param_hint="--spec")
    models = [Model(name, None, dtype, device) for name in names or ()]
    models += [Model(None, path, dtype, device) for path in checkpoints]
    for model in models:
        Console().print(comparison_table(model, ways, frames=frames, size=size, rounds=rounds))


def comparison_table(model: Model, ways: list[Way], *, frames: int, size: int, rounds: int) -> Table:
    """A row per way. One that the model cannot run has the reason instead of figures."""
    where = torch.cuda.get_device_name(model.device) if model.device.startswith("cuda") else model.device
    table = Table(
        title=f"{model.spec_name or model.checkpoint}, {frames} x {size} x {size}, {model.dtype} on {where}, "
        f"{rounds} rounds"
    )
    headings = ("encode s", "decode s", "MiB", "mean RMS", "pixel RMS", "PSNR")
    for heading in ("way", *headings):
        table.add_column(heading, justify="left" if heading == "way" else "right", no_wrap=heading == "way")
    with tempfile.TemporaryDirectory() as folder:
        results = _measure_all(model, ways, Path(folder), shape=(frames, size, size), rounds=rounds)
        for way in ways:
            result = results[way]
            row = (result,) if isinstance(result, str) else _cells(result, way, ways, results, Path(folder))
            table.add_row(str(way), *row)
    return table


def _measure_all(
    model: Model, ways: list[Way], folder: Path, *, shape: tuple[int, int, int], rounds: int
) -> dict[Way, list[Figures] | str]:
    results: dict[Way, list[Figures] | str] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            before = results[way]
            if not isinstance(before, str):
                answer = _in_a_process(model, way, shape, folder)
                results[way] = answer if isinstance(answer, str) else [*before, answer]
    return results


def _in_a_process(model: Model, way: Way, shape: tuple[int, int, int], folder: Path) -> Figures | str:
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, model, way, shape, folder, torch.get_num_threads()).result()
        except BrokenProcessPool:
            return "killed: probably out of memory"


def measure(model: Model, way: Way, shape: tuple[int, int, int], folder: Path, threads: int) -> Figures | str:
    """Runs one way in this process and leaves its mean and pixels in `folder`. A text says why it cannot run."""
    torch.set_num_threads(threads)
    try:
        vae = _planned(model.load(), way)
        if way.kind == "stream" and not vae.streams:
            return "does not stream"
        video_BCTHW = smooth_video(*shape, seed=0)
        vae.spec.latent_shape(*shape)
        _run(vae, way, smooth_video(shape[0], vae.spec.space_stride, vae.spec.space_stride, seed=0))  # loads code
        return _timed_run(vae, way, video_BCTHW, folder / f"{way}.safetensors")
    except ValueError as error:
        return str(error)
    except torch.OutOfMemoryError:
        return "out of memory"


def _planned(vae: VideoVAE, way: Way) -> VideoVAE:
    """The same weights with the tile plan of that way: none, or one in time."""
    spec = replace(vae.spec, tile_frames=way.frames if way.kind == "tiles" else None, tile_size=None)
    with torch.device("meta"):
        planned = build_vae(spec)
    planned.load_state_dict(vae.state_dict(), assign=True)
    return planned.use_memory_format(torch.channels_last_3d)


def _timed_run(vae: VideoVAE, way: Way, video_BCTHW: Tensor, file: Path) -> Figures:
    return_free_memory()  # or the run would be given what making the model left behind
    meter = _MemoryMeter(vae.device)
    mean_BCTHW, pixels_BCTHW, seconds = _run(vae, way, video_BCTHW)
    peak_mib = meter.peak_mib()
    answers = {"mean": mean_BCTHW.float().cpu().contiguous(), "pixels": pixels_BCTHW.float().cpu().contiguous()}
    safetensors.torch.save_file(answers | {"video": video_BCTHW}, file)
    return Figures(*seconds, peak_mib)


@torch.inference_mode()
def _run(vae: VideoVAE, way: Way, video_BCTHW: Tensor) -> tuple[Tensor, Tensor, tuple[float, float]]:
    """Mean, pixels, and the seconds that encoding and decoding took."""
    video_BCTHW = video_BCTHW.to(device=vae.device, dtype=vae.dtype)
    started = _now(vae.device)
    mean_BCTHW = _encode(vae, way, video_BCTHW)
    encoded = _now(vae.device)
    pixels_BCTHW = _decode(vae, way, mean_BCTHW)
    return mean_BCTHW, pixels_BCTHW, (encoded - started, _now(vae.device) - encoded)


def _encode(vae: VideoVAE, way: Way, video_BCTHW: Tensor) -> Tensor:
    if way.kind == "tiles" or not vae.streams:  # without a tile plan, encode is the one shot of a model that has none
        return vae.encode(video_BCTHW).mean
    if way.kind == "one shot":
        moments_BCTHW, _ = vae.encode_chunk(video_BCTHW, None)
    else:
        assert way.frames is not None
        num_frames = video_BCTHW.shape[2]
        moments_BCTHW = apply_in_chunks(
            vae.encode_chunk,
            video_BCTHW,
            plan_chunks(num_frames, chunk=way.frames),
            num_frames_out=vae.spec.num_latent_frames(num_frames),
        )
    return moments_BCTHW.chunk(2, dim=1)[0]


def _decode(vae: VideoVAE, way: Way, latent_BCTHW: Tensor) -> Tensor:
    if way.kind == "tiles" or not vae.streams:
        return vae.decode(latent_BCTHW)
    if way.kind == "one shot":
        return vae.decode_chunk(latent_BCTHW, None)[0]
    assert way.frames is not None
    num_latent_frames = latent_BCTHW.shape[2]
    return apply_in_chunks(
        vae.decode_chunk,
        latent_BCTHW,
        plan_chunks(num_latent_frames, chunk=max(1, way.frames // vae.spec.time_stride)),
        num_frames_out=vae.spec.num_video_frames(num_latent_frames),
    )


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- memory and figures -----------------------------------------------------------------------------------------


class _MemoryMeter:
    """The largest memory from now on, above what is taken now: of the device, or of this process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before: float | None = torch.cuda.memory_allocated(device) / 2**20
        else:
            self._before = rss_mib()
            reset_peak_rss()

    def peak_mib(self) -> float | None:
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) / 2**20 - self._before
        peak = peak_rss_mib()
        return None if peak is None else peak - self._before


def _cells(
    figures: list[Figures], way: Way, ways: list[Way], results: dict[Way, list[Figures] | str], folder: Path
) -> tuple[str, ...]:
    peaks = [item.peak_mib for item in figures if item.peak_mib is not None]
    got = safetensors.torch.load_file(folder / f"{way}.safetensors")
    # one shot, or the first way that could be run where that could not
    reference = next(other for other in ways if not isinstance(results[other], str))
    expected = safetensors.torch.load_file(folder / f"{reference}.safetensors")
    pixels, video = (to_unit_range(got[name], (-1.0, 1.0)) for name in ("pixels", "video"))
    deviations = [
        "-" if reference == way else f"{difference(got[part], expected[part])[0]:.1e}" for part in ("mean", "pixels")
    ]
    return (
        f"{statistics.median(item.encode_seconds for item in figures):.2f}",
        f"{statistics.median(item.decode_seconds for item in figures):.2f}",
        f"{statistics.median(peaks):.0f}" if peaks else "?",
        *deviations,
        f"{psnr_of_videos(pixels, video).item():.2f}",
    )


if __name__ == "__main__":
    typer.run(compare_streaming)
