"""How fast the encoder is on a CUDA GPU: per size, dtype, layout, batch and mode, as a share of a measured peak.

    python jobs/bench_gpu.py
    python jobs/bench_gpu.py --spec cvvae-sd3 --size 512 --batch 4 --batch 16

Frames/s and TFLOP/s are of tiles of 17 frames, results left on the GPU. The peak is the best of large square matrix
products in the same dtype: what this GPU gives in practice, not what its data sheet says. Modes: eager, as the
pipeline runs (deterministic kernels, no autotuning); autotuned kernels; torch.compile; for the VAEs of diffusers its
own class called with the same weights. Every row is timed after its
warm-up, which for torch.compile is the compilation. Prints the start-up probe of 3-D convolutions too. The encoder's
busy share in the pipeline is in bench_pipeline.py's table. Without a CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import gc
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from cvvae import VAESpec, build_vae, seeded_vae
from cvvae.conv_probe import probe_conv3d
from cvvae.diffusers_vae import DiffusersSpec, whole_model
from jobs.bench_encode import spec_named
from jobs.bench_report import BenchTable, machine
from jobs.measure_precision import difference, smooth_video
from pipeline.encoder import make_deterministic

Layout = Literal["channels_last", "contiguous"]
Mode = Literal["eager", "autotuned", "compiled", "diffusers"]
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
FORMATS: dict[Layout, torch.memory_format] = {
    "channels_last": torch.channels_last_3d,
    "contiguous": torch.contiguous_format,
}
MEASURED = ("cvvae-sd21", "ivvae-z4-dim64", "ivvae-z16-dim96", "wan21", "cogvideox-2b")
FRAMES = 17
MATMUL_SIDES = (4096, 8192, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to run the encoder."""

    size: int
    dtype: str
    layout: Layout
    batch: int
    mode: Mode = "eager"


@dataclass(frozen=True, slots=True)
class Timed:
    """What was measured of a setting."""

    seconds: float
    """Of one batch."""
    peak_bytes: int
    """Allocated at most, model and input included; 0 but on CUDA."""
    relative_rms: float
    """Of one tile's moments against fp32."""


def bench_gpu(
    spec: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(MEASURED)}.")] = None,
    size: Annotated[list[int] | None, typer.Option(help="Heights and widths; default: 256 and 512.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="Default: fp16 and bf16.")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Tiles; default: 1, 4 and 16.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Batches timed per row; the best counts.")] = 5,
) -> None:
    """Frames/s, share of the measured peak and memory of the encoder on a GPU."""
    if not torch.cuda.is_available():
        print("no CUDA device: nothing is measured")
        return
    print(machine())
    device = torch.device("cuda")
    make_deterministic(None)
    dtypes = dtype or ["fp16", "bf16"]
    print(probe_table(dtypes, device), flush=True)
    peaks = {name: peak_flops(DTYPES[name], device, MATMUL_SIDES) for name in dtypes}
    for named in [spec_named(name) for name in spec or MEASURED]:
        bench = GpuBench(named, device, repeats)
        for side in size or (256, 512):
            print(size_table(bench, side, dtypes, batch or [1, 4, 16], peaks), flush=True)


def probe_table(dtypes: Sequence[str], device: torch.device) -> BenchTable:
    """What the start-up probe finds, per dtype and layout."""
    headings = ("dtype", "layout", "relative RMS", "times the 2-D time", "scratch MiB", "verdict")
    table = BenchTable("start-up probe of 3-D convolutions", headings, labels=2)
    for name, layout in itertools.product([name for name in dtypes if name != "fp32"], FORMATS):
        found = probe_conv3d(DTYPES[name], device, FORMATS[layout])
        verdict = "wrong" if found.is_wrong else "slow" if found.is_slow else "good"
        scratch = "-" if found.extra_bytes is None else f"{found.extra_bytes / 2**20:.0f}"
        table.add(name, layout, f"{found.relative_rms:.1e}", f"{found.slowdown:.2f}", scratch, verdict)
    return table


def size_table(
    bench: GpuBench,
    size: int,
    dtypes: Sequence[str],
    batches: Sequence[int],
    peaks: dict[str, float],
    *,
    modes: Sequence[Mode] = ("autotuned", "compiled"),
) -> BenchTable:
    """Every dtype, layout and batch eagerly; the other modes for the fastest of each dtype."""
    table = BenchTable(
        f"encode, {bench.spec.name}, {FRAMES} x {size} x {size}",
        ("dtype", "layout", "batch", "mode", "frames/s", "TFLOP/s", "of peak", "peak GiB", "relative RMS"),
        labels=4,
    )
    for dtype in dtypes:
        fastest: tuple[float, Setting] | None = None
        for layout, batch in itertools.product(FORMATS, batches):
            setting = Setting(size=size, dtype=dtype, layout=layout, batch=batch)
            rate = bench.row(table, setting, peaks[dtype])
            if rate is not None and (fastest is None or rate > fastest[0]):
                fastest = rate, setting
        if fastest is not None:
            of_diffusers: tuple[Mode, ...] = ("diffusers",) if isinstance(bench.spec, DiffusersSpec) else ()
            for mode in (*modes, *of_diffusers):
                bench.row(table, replace(fastest[1], mode=mode), peaks[dtype])
    stated = ", ".join(f"{name} {flops / 1e12:.0f}" for name, flops in peaks.items())
    table.notes.append(
        f"Peak of matrix products, TFLOP/s: {stated}. Relative RMS of the raw moments is against fp32."
    )
    return table


class GpuBench:
    """One model on one device."""

    def __init__(self, spec: VAESpec, device: torch.device, repeats: int) -> None:
        self.spec = spec
        self._device = device
        self._repeats = repeats
        self._weights = seeded_vae(spec, 0)
        self._exact: dict[int, Tensor] = {}

    def row(self, table: BenchTable, setting: Setting, peak: float) -> float | None:
        """Add the setting's row; frames/s, or None if it does not fit into memory."""
        labels = (setting.dtype, setting.layout, str(setting.batch), setting.mode)
        try:
            timed = self.time(setting)
        except torch.OutOfMemoryError:
            table.add(*labels, "out of memory", "", "", "", "")
            return None
        rate = setting.batch * FRAMES / timed.seconds
        flops = setting.batch * encode_flops(self.spec, FRAMES, setting.size) / timed.seconds
        figures = (f"{rate:.0f}", f"{flops / 1e12:.1f}", f"{100 * flops / peak:.0f} %")
        table.add(*labels, *figures, f"{timed.peak_bytes / 2**30:.1f}", f"{timed.relative_rms:.1e}")
        return rate

    def time(self, setting: Setting) -> Timed:
        """torch.OutOfMemoryError if it does not fit."""
        exact = self._exact_moments(setting.size)
        self._free()
        encode = self._encoder(setting.dtype, setting.layout)
        if setting.mode == "diffusers":
            encode = self._diffusers_encoder(setting.dtype)
        elif setting.mode == "compiled":
            torch.compiler.reset()
            encode = torch.compile(encode)
        video_BCTHW = self._video(setting)
        try:
            with torch.inference_mode(), _autotuning(setting.mode == "autotuned"):
                moments = encode(video_BCTHW)
                seconds = min(self._once(encode, video_BCTHW) for _ in range(self._repeats))
            peak = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
            relative, _ = difference(moments[:1].float().cpu(), exact)
            return Timed(seconds, peak, relative)
        finally:
            del encode, video_BCTHW
            self._free()

    def _encoder(self, dtype: str, layout: Layout) -> Callable[[Tensor], Tensor]:
        """Of one tile per batch entry, in the given layout all through."""
        vae = build_vae(self.spec)
        vae.load_state_dict(self._weights.state_dict())
        return vae.to(self._device, DTYPES[dtype]).use_memory_format(FORMATS[layout]).encode_tile

    def _diffusers_encoder(self, dtype: str) -> Callable[[Tensor], Tensor]:
        """The class's own `encode`, which keeps its caches on itself."""
        assert isinstance(self.spec, DiffusersSpec)
        model = whole_model(self.spec)
        model.load_state_dict(self._weights.state_dict())
        model = cast(Any, model.to(self._device, DTYPES[dtype]).eval())
        return lambda video_BCTHW: model.encode(video_BCTHW).latent_dist.parameters

    def _video(self, setting: Setting) -> Tensor:
        one = smooth_video(FRAMES, setting.size, setting.size, seed=0)
        video_BCTHW = one.expand(setting.batch, -1, -1, -1, -1).to(self._device, DTYPES[setting.dtype])
        return video_BCTHW.contiguous(memory_format=FORMATS[setting.layout])

    def _exact_moments(self, size: int) -> Tensor:
        if size not in self._exact:
            with torch.inference_mode():
                video_BCTHW = self._video(Setting(size=size, dtype="fp32", layout="channels_last", batch=1))
                self._exact[size] = self._encoder("fp32", "channels_last")(video_BCTHW).cpu()
        return self._exact[size]

    def _once(self, encode: Callable[[Tensor], Tensor], video_BCTHW: Tensor) -> float:
        _wait(self._device)
        started = time.perf_counter()
        encode(video_BCTHW)
        _wait(self._device)
        return time.perf_counter() - started

    def _free(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)


def encode_flops(spec: VAESpec, frames: int, size: int) -> int:
    """Operations (two per multiply-add) of encoding one tile: of the direct convolutions, whatever runs."""
    with torch.device("meta"):
        vae = build_vae(spec)
        video_BCTHW = torch.empty(1, spec.in_channels, frames, size, size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        vae.encode_tile(video_BCTHW)
    return counter.get_total_flops()


def peak_flops(dtype: torch.dtype, device: torch.device, sides: Sequence[int]) -> float:
    """The best operations per second of square matrix products of these sides."""
    return max(_matmul_flops(dtype, device, side) for side in sides)


def _matmul_flops(dtype: torch.dtype, device: torch.device, side: int) -> float:
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    times: list[float] = []
    for _ in range(6):  # the first one warms up and is never the best
        _wait(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait(device)
        times.append(time.perf_counter() - started)
    return 2 * side**3 / min(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _autotuning(on: bool) -> Iterator[None]:
    """cuDNN may try kernels and keep the fastest, deterministic or not; the pipeline never lets it."""
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = on, not on
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True


if __name__ == "__main__":
    typer.run(bench_gpu)
