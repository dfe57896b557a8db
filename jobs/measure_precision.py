"""How far bf16 and fp16 latents are from fp32 ones: relative RMS and largest difference of the raw moments.

    python jobs/measure_precision.py --spec cvvae-sd21-tiny --shape 17 64 64
    python jobs/measure_precision.py --checkpoint path/to/vae3d --shape 17 256 256 --device cuda

The input is smooth random motion, not a real clip: compare dtypes with it, not models. fp16 convolutions
on a CPU are about a hundred times slower than fp32 ones; keep the shape small or leave fp16 out.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from cvvae import SPECS, VideoVAE, load_vae, seeded_vae

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)

    def fresh() -> VideoVAE:
        if options.checkpoint:
            return load_vae(options.checkpoint, device=options.device)
        return seeded_vae(SPECS[options.spec], options.seed).to(options.device)

    vae = fresh()
    video_BCTHW = smooth_video(*options.shape, seed=options.seed).to(options.device)
    weights = str(options.checkpoint) if options.checkpoint else f"seeded {options.seed}"
    print(f"{vae.spec.name}, weights {weights}, {'x'.join(map(str, options.shape))}, {options.device}")
    print(f"{'dtype':6} {'part':7} {'rel RMS':>9} {'max abs':>9} {'seconds':>8}")
    exact, _ = _moments(vae, video_BCTHW)
    for name in options.dtypes:
        moments, seconds = _moments(fresh().to(DTYPES[name]), video_BCTHW)
        for part, got, expected in zip(("mean", "logvar"), moments.chunk(2, 1), exact.chunk(2, 1), strict=True):
            rel_rms, max_abs = difference(got, expected)
            print(f"{name:6} {part:7} {rel_rms:9.2e} {max_abs:9.2e} {seconds:8.2f}")


def smooth_video(num_frames: int, height: int, width: int, *, seed: int) -> Tensor:
    """(1, 3, T, H, W) in [-1, 1]: coarse noise interpolated in space and time, as a soft clip is."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, max(2, num_frames // 4), max(2, height // 8), max(2, width // 8), generator=generator)
    return F.interpolate(coarse, size=(num_frames, height, width), mode="trilinear", align_corners=True) * 2 - 1


def difference(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative RMS and largest absolute difference. A non-finite value in `got` makes both non-finite."""
    error = got.double() - expected.double()
    return (error.square().mean() / expected.double().square().mean()).sqrt().item(), error.abs().max().item()


def _moments(vae: VideoVAE, video_BCTHW: Tensor) -> tuple[Tensor, float]:
    start = time.perf_counter()
    with torch.inference_mode():
        posterior = vae.encode(video_BCTHW.to(vae.dtype))
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu()
    return moments, time.perf_counter() - start


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Deviation of half-precision moments from fp32 ones.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--spec", choices=sorted(SPECS), default="cvvae-sd21-tiny", help="with seeded weights")
    source.add_argument("--checkpoint", type=Path, help="a directory or file that cvvae.load_vae reads")
    parser.add_argument("--seed", type=int, default=0, help="of the seeded weights and of the video")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "H", "W"), default=(17, 64, 64))
    parser.add_argument("--dtypes", nargs="+", choices=sorted(DTYPES), default=["bf16", "fp16"])
    parser.add_argument("--device", default="cpu")
    return parser


if __name__ == "__main__":
    main()
