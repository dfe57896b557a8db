"""How fast IV-VAE's encoder is on this CPU: the package's against the plain transcription in plain_iv_vae.py.

    python jobs/bench_iv_vae.py
    python jobs/bench_iv_vae.py --spec ivvae-z16-dim96 --frames 17 --size 128 --rounds 3 --threads 1

Same seeded weights, one clip of smooth random video. The variants of a round run one after another, so that a noisy
machine is noisy for all; ratios are medians over the rounds of CPU seconds, which others on the machine disturb
least. On a busy machine set OMP_WAIT_POLICY=PASSIVE, or threads that wait for each other are what is measured. bf16
is measured where the CPU computes in it.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cvvae import SPECS, VideoVAE, seeded_vae
from jobs.measure_precision import difference, smooth_video
from jobs.plain_iv_vae import PlainIVVAE

FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""Capabilities of a CPU, as torch.cpu calls them, with which bf16 is faster than fp32."""


def bench_iv_vae(
    spec: Annotated[str, typer.Option(help="A published IV-VAE, or a tiny one of the same kind.")] = "ivvae-z4-dim64",
    frames: Annotated[int, typer.Option(min=1)] = 17,
    size: Annotated[int, typer.Option(min=8, help="Height and width.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: PyTorch's own choice.")] = None,
) -> None:
    """Seconds and deviation of the encoder, plain and ours, in fp32 and bf16."""
    if threads is not None:
        torch.set_num_threads(threads)
    vae = seeded_vae(SPECS[spec], 0)
    video_BCTHW = smooth_video(frames, size, size, seed=0)
    runners = _runners(vae)
    for run in runners.values():
        run(video_BCTHW[:, :, :5, :16, :16])  # loads code, starts threads
    wall: dict[str, list[float]] = {name: [] for name in runners}
    cpu: dict[str, list[float]] = {name: [] for name in runners}
    moments: dict[str, Tensor] = {}
    for _ in range(rounds):
        for name, run in runners.items():
            before = time.perf_counter(), time.process_time()
            moments[name] = run(video_BCTHW)
            wall[name].append(time.perf_counter() - before[0])
            cpu[name].append(time.process_time() - before[1])
    table = Table(
        title=f"encode, {spec}, {frames} x {size} x {size}, {torch.get_num_threads()} threads, {rounds} rounds"
    )
    for heading in ("code", "s", "CPU s", "times as fast", "relative RMS", "largest difference"):
        table.add_column(heading, justify="left" if heading == "code" else "right")
    for name in runners:
        ratio = statistics.median(a / b for a, b in zip(cpu["plain fp32"], cpu[name], strict=True))
        relative, largest = difference(moments[name], moments["plain fp32"])
        seconds = (f"{statistics.median(times[name]):.2f}" for times in (wall, cpu))
        table.add_row(name, *seconds, f"{ratio:.2f}", f"{relative:.1e}", f"{largest:.1e}")
    Console().print(table)


def _runners(vae: VideoVAE) -> dict[str, Callable[[Tensor], Tensor]]:
    """fp32 pixels -> raw moments in fp32, each with weights of its own."""
    runners = _pair(vae, torch.float32, "fp32")
    capabilities = torch.cpu.get_capabilities()
    if any(capabilities.get(name) for name in FAST_BF16):
        runners |= _pair(copy.deepcopy(vae).bfloat16(), torch.bfloat16, "bf16")
    else:
        print("This CPU has no bf16 arithmetic: bf16 is not measured.")
    return runners


def _pair(vae: VideoVAE, dtype: torch.dtype, name: str) -> dict[str, Callable[[Tensor], Tensor]]:
    plain = PlainIVVAE(vae.spec, vae.state_dict())

    @torch.inference_mode()
    def ours(video_BCTHW: Tensor) -> Tensor:
        posterior = vae.encode(video_BCTHW.to(dtype))
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float()

    return {f"plain {name}": lambda video_BCTHW: plain.encode(video_BCTHW.to(dtype)).float(), f"ours {name}": ours}


if __name__ == "__main__":
    typer.run(bench_iv_vae)
