"""How fast the encoder alone is: each family's against the plain transcription of its authors' (jobs/plain_*.py).

    python jobs/bench_encode.py
    python jobs/bench_encode.py --spec cvvae-sd21 --frames 17 --size 128 --rounds 5

Per dtype and memory layout, with the same seeded weights, one tile of smooth random video. The variants of a round
run one after another, so that a noisy machine is noisy for all; ratios are medians over the rounds. Memory is the
peak of one call in a process of its own, above what the loaded model takes. Half precision is measured where the CPU
computes in it; fp16 is about a hundred times slower than fp32 on most and is left to bench_gpu.py.
"""

from __future__ import annotations

import copy
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from torch import Tensor

from cvvae import SPECS, VAESpec, VideoVAE, build_vae, seeded_vae
from jobs.bench_report import (
    BenchTable,
    has_fast_bf16,
    machine,
    mib_text,
    peak_rss_mib,
    ratio_text,
    reset_peak_rss,
    return_free_memory,
    rss_mib,
)
from jobs.measure_precision import difference, smooth_video
from jobs.plain_vae import PlainDecoder, plain_vae

GOLDEN_RMS, GOLDEN_MAX = 1e-5, 2e-4
"""Largest relative RMS and difference of fp32 moments that count as the same numbers: as in the golden tests."""

RELEASED = ("cvvae-sd21", "cvvae-sd3", "ivvae-z4-dim64", "od-vae", "open-sora-1.2")

Runner = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to run the encoder."""

    code: Literal["plain", "ours"]
    dtype: Literal["fp32", "bf16"]
    layout: Literal["contiguous", "channels_last"]

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float32 if self.dtype == "fp32" else torch.bfloat16

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last_3d if self.layout == "channels_last" else torch.contiguous_format


PLAIN = Variant("plain", "fp32", "contiguous")
FP32 = (PLAIN, Variant("ours", "fp32", "channels_last"), Variant("ours", "fp32", "contiguous"))
BF16 = (
    Variant("plain", "bf16", "contiguous"),
    Variant("ours", "bf16", "channels_last"),
    Variant("ours", "bf16", "contiguous"),
)


def bench_encode(
    spec: Annotated[list[str] | None, typer.Option(help=f"Named specs; default: {', '.join(RELEASED)}.")] = None,
    frames: Annotated[int, typer.Option(min=1)] = 17,
    size: Annotated[int, typer.Option(min=16, help="Height and width.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: PyTorch's own choice.")] = None,
) -> None:
    """Time, memory and deviation of the encoder per dtype and layout, against the plain transcription."""
    if threads is not None:
        torch.set_num_threads(threads)
    variants = FP32 + (BF16 if has_fast_bf16() else ())
    print(machine(), f"{torch.get_num_threads()} threads", sep=", ")
    if not has_fast_bf16():
        print("This CPU has no bf16 arithmetic: bf16 is not measured.")
    video_BCTHW = smooth_video(frames, size, size, seed=0)
    for named in [spec_named(name) for name in spec or RELEASED]:
        print(encode_table(named, video_BCTHW, variants, rounds), flush=True)
        if (table := decode_table(named, frames, size // 2)) is not None:
            print(table, flush=True)


def spec_named(name: str) -> VAESpec:
    """typer.BadParameter for a name that is not known."""
    if name not in SPECS:
        raise typer.BadParameter(f"--spec: expected one of {', '.join(sorted(SPECS))}, got {name!r}")
    return SPECS[name]


def encode_table(spec: VAESpec, video_BCTHW: Tensor, variants: tuple[Variant, ...], rounds: int) -> BenchTable:
    """The table of one model: a row per variant."""
    _, _, frames, height, width = video_BCTHW.shape
    table = BenchTable(
        f"encode, {spec.name}, {frames} x {height} x {width}, {rounds} rounds",
        (
            "code",
            "dtype",
            "layout",
            "frames/s",
            "times as fast",
            "relative RMS",
            "largest diff.",
            "golden",
            "peak MiB",
        ),
        labels=3,
    )
    seconds, moments = _measure(spec, video_BCTHW, variants, rounds)
    for variant in variants:
        row = [variant.code, variant.dtype, variant.layout, f"{frames / statistics.median(seconds[variant]):.2f}"]
        row.append(ratio_text(seconds[PLAIN], seconds[variant]))
        relative, largest = difference(moments[variant], moments[PLAIN])
        row += [f"{relative:.1e}", f"{largest:.1e}", _golden(variant, relative, largest)]
        table.add(*row, mib_text(peak_memory(spec, variant, video_BCTHW)))
    table.notes.append(
        "Deviation of the raw moments is from plain fp32. golden: the bounds of the golden tests "
        f"({GOLDEN_RMS:g} and {GOLDEN_MAX:g}). Peak MiB: resident memory of one call above the loaded model's."
    )
    return table


def _golden(variant: Variant, relative: float, largest: float) -> str:
    if variant.dtype != "fp32":
        return "-"
    return "within" if relative <= GOLDEN_RMS and largest <= GOLDEN_MAX else "OUTSIDE"


def _measure(
    spec: VAESpec, video_BCTHW: Tensor, variants: tuple[Variant, ...], rounds: int
) -> tuple[dict[Variant, list[float]], dict[Variant, Tensor]]:
    vae = seeded_vae(spec, 0)
    runners = {variant: _runner(vae, variant) for variant in variants}
    seconds: dict[Variant, list[float]] = {variant: [] for variant in variants}
    moments: dict[Variant, Tensor] = {}
    for run in runners.values():
        run(_small_part(video_BCTHW, spec))  # loads code, starts threads
    for _ in range(rounds):
        for variant, run in runners.items():
            started = time.perf_counter()
            moments[variant] = run(video_BCTHW)
            seconds[variant].append(time.perf_counter() - started)
    return seconds, moments


def _small_part(video_BCTHW: Tensor, spec: VAESpec) -> Tensor:
    side = 2 * spec.space_stride
    return video_BCTHW[..., :side, :side]


def _runner(vae: VideoVAE, variant: Variant) -> Runner:
    """fp32 pixels to raw moments, with weights of its own."""
    dtype = variant.torch_dtype
    ours = copy.deepcopy(vae).to(dtype)
    if variant.code == "plain":
        plain = plain_vae(vae.spec, ours.state_dict())
        return lambda video_BCTHW: plain.encode_tile(video_BCTHW.to(dtype))
    ours.use_memory_format(variant.memory_format)

    @torch.inference_mode()
    def run(video_BCTHW: Tensor) -> Tensor:
        return ours.encode_tile(video_BCTHW.to(dtype))

    return run


def peak_memory(spec: VAESpec, variant: Variant, video_BCTHW: Tensor) -> float | None:
    """MiB that one call takes at most, above the loaded model: in a new process. None where that is not known."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_in_this_process, (spec, variant, tuple(video_BCTHW.shape), torch.get_num_threads()))


def _peak_in_this_process(spec: VAESpec, variant: Variant, shape: tuple[int, ...], threads: int) -> float | None:
    torch.set_num_threads(threads)
    run = _runner(build_vae(spec), variant)  # any weights take as much memory
    video_BCTHW = smooth_video(*shape[2:], seed=0)
    run(_small_part(video_BCTHW, spec))
    return_free_memory()  # or the call would be given what making the model left behind
    before = rss_mib()
    reset_peak_rss()
    run(video_BCTHW)
    peak = peak_rss_mib()
    return None if peak is None or before is None else peak - before


def decode_table(spec: VAESpec, frames: int, size: int) -> BenchTable | None:
    """The decoder in fp32, for information: the pipeline does not decode. None without a plain one."""
    vae = seeded_vae(spec, 0)
    plain = plain_vae(spec, vae.state_dict())
    if not isinstance(plain, PlainDecoder):
        return None
    latent_BCTHW = torch.randn(1, *spec.latent_shape(frames, size, size), generator=torch.Generator().manual_seed(0))
    seconds: dict[str, float] = {}
    pixels: dict[str, Tensor] = {}
    for code, run in (("plain", plain.decode_tile), ("ours", torch.inference_mode()(vae.decode))):
        run(latent_BCTHW[..., :2, :2])
        started = time.perf_counter()
        pixels[code] = run(latent_BCTHW)
        seconds[code] = time.perf_counter() - started
    table = BenchTable(
        f"decode, {spec.name}, {frames} x {size} x {size}, fp32, once",
        ("code", "s", "times as fast", "relative RMS", "largest diff."),
    )
    for code in seconds:
        relative, largest = difference(pixels[code], pixels["plain"])
        ratio = f"{seconds['plain'] / seconds[code]:.2f}"
        table.add(code, f"{seconds[code]:.2f}", ratio, f"{relative:.1e}", f"{largest:.1e}")
    return table


if __name__ == "__main__":
    typer.run(bench_encode)
