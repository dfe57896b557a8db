"""How far bf16 and fp16 latents are from fp32 ones: relative RMS and largest difference of the raw moments.

    python jobs/measure_precision.py
    python jobs/measure_precision.py --checkpoint path/to/vae3d --frames 17 --size 256 --device cuda

The input is smooth random motion, not a real clip: compare dtypes with it, not models. fp16 convolutions are very
slow on CPUs without fp16 arithmetic; keep the size small there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import torch.nn.functional as F  # noqa: N812
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from cvvae import SPECS, VideoVAE, load_vae, seeded_vae

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}
TINY = ("cvvae-sd21-tiny", "cvvae-sd21-full3d-tiny", "cvvae-sd3-tiny")


def measure_precision(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A folder or file that load_vae reads; without it, seeded tiny models.")
    ] = None,
    frames: Annotated[int, typer.Option(min=1)] = 17,
    size: Annotated[int, typer.Option(min=8, help="Height and width.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the seeded weights and of the video.")] = 0,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Deviation of bf16 and fp16 moments from fp32 ones."""
    table = Table(title=f"against fp32, {frames} x {size} x {size} on {device}: relative RMS / largest difference")
    for heading in ("model", "dtype", "mean", "log variance"):
        table.add_column(heading)
    video_BCTHW = smooth_video(frames, size, size, seed=seed).to(device)
    for name in [str(checkpoint)] if checkpoint else TINY:
        exact = _moments(_fresh(name, checkpoint, seed, device), video_BCTHW)
        for dtype in HALF:
            got = _moments(_fresh(name, checkpoint, seed, device).to(HALF[dtype]), video_BCTHW)
            parts = zip(got.chunk(2, dim=1), exact.chunk(2, dim=1), strict=True)
            table.add_row(name, dtype, *("{:.1e} / {:.1e}".format(*difference(*part)) for part in parts))
    Console().print(table)


def _fresh(name: str, checkpoint: Path | None, seed: int, device: str) -> VideoVAE:
    return load_vae(checkpoint, device=device) if checkpoint else seeded_vae(SPECS[name], seed).to(device)


def smooth_video(num_frames: int, height: int, width: int, *, seed: int) -> Tensor:
    """(1, 3, T, H, W) in [-1, 1]: coarse noise interpolated in space and time, as a soft clip is."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, num_frames // 4), max(2, height // 8), max(2, width // 8), generator=generator)
    return F.interpolate(coarse, size=(num_frames, height, width), mode="trilinear", align_corners=True) * 2 - 1


def difference(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative RMS and largest absolute difference. A non-finite value in `got` makes both non-finite."""
    error = got.double() - expected.double()
    return (error.square().mean() / expected.double().square().mean()).sqrt().item(), error.abs().max().item()


def _moments(vae: VideoVAE, video_BCTHW: Tensor) -> Tensor:
    with torch.inference_mode():
        posterior = vae.encode(video_BCTHW.to(vae.dtype))
        return torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()


if __name__ == "__main__":
    typer.run(measure_precision)
