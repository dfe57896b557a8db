"""How well held-out samples come back: PSNR of decode(mode of encode), over all workers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cvvae import VideoVAE
from pipeline.errors import SourceError
from pipeline.training.batches import to_video
from pipeline.training.workers import Workers

NUM_PICTURED = 4
LARGEST_DB = 100.0


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Means over the held-out samples of all workers."""

    figures: dict[str, float]
    pictured: list[tuple[np.ndarray, np.ndarray]]
    """Source and reconstruction, uint8 THWC, of this worker's first samples."""


def to_frames(video_CTHW: Tensor) -> np.ndarray:
    """[-1, 1], clamped -> uint8 THWC."""
    levels = video_CTHW.float().clamp(-1.0, 1.0).add(1.0).mul(127.5).round()
    return levels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def psnr(decoded_THWC: np.ndarray, source_THWC: np.ndarray) -> float:
    """dB, of the mean squared error of all 8-bit values of a clip; at most 100."""
    error = np.square(decoded_THWC.astype(np.float64) - source_THWC).mean()
    return LARGEST_DB if error == 0 else min(LARGEST_DB, 10.0 * math.log10(255.0**2 / error))


@torch.no_grad()
def evaluate(
    model: VideoVAE, samples: Sequence[tuple[str, np.ndarray]], workers: Workers, autocast: torch.autocast
) -> Evaluation:
    """The same on every worker but for the pictures. SourceError if there is not a single sample."""
    scores: list[float] = []
    pictured: list[tuple[np.ndarray, np.ndarray]] = []
    for _, frames_THWC in samples:
        video_BCTHW = to_video(frames_THWC[None], workers.device)
        with autocast:
            decoded_BCTHW = model.decode(model.encode(video_BCTHW).mode().float())
        decoded_THWC = to_frames(decoded_BCTHW[0])
        scores.append(psnr(decoded_THWC, frames_THWC))
        if len(pictured) < NUM_PICTURED:
            pictured.append((frames_THWC, decoded_THWC))
    gathered = [score for part in workers.gather(scores) for score in part]
    if not gathered:
        raise SourceError("data.held_out: none of its samples can be decoded")
    figures = {"held_out_psnr": float(np.mean(gathered)), "held_out_samples": float(len(gathered))}
    return Evaluation(figures, pictured)
