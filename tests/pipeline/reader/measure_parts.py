"""How far a part of a window is from the latents of its frames alone: the table of docs/training.md.

python -m tests.pipeline.reader.measure_parts
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from cvvae import SPECS, seeded_vae
from jobs.real_clips import fetch_real_clips

FRAMES, SIZE, CLIPS = 33, 96, 3
SPEC_NAMES = ("cvvae-sd21-tiny",)


def first_frames(path: Path) -> Tensor:
    """(1, 3, FRAMES, SIZE, SIZE) in [-1, 1]: the left or upper square of each frame."""
    import av

    frames = []
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            image = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)[None].float()
            side = min(image.shape[2:])
            square = image[:, :, :side, :side]
            frames.append(functional.interpolate(square, (SIZE, SIZE), mode="bilinear", antialias=True)[0])
            if len(frames) == FRAMES:
                break
    return (torch.stack(frames, dim=1) / 127.5 - 1)[None]


def deviation(part: Tensor, alone: Tensor) -> float:
    return float(((part - alone).square().mean() / alone.square().mean()).sqrt())


def main() -> None:
    clips = fetch_real_clips()
    videos = [first_frames(clips[name]) for name in list(clips)[:CLIPS]]
    for name in SPEC_NAMES:
        vae = seeded_vae(SPECS[name], 0)
        found: dict[str, list[float]] = {}
        with torch.inference_mode():
            for video in videos:
                whole = vae.encode(video).mean
                alone = vae.encode(video[:, :, :9]).mean
                found.setdefault("first 9 frames", []).append(
                    deviation(vae.encode(video[:, :, :17]).mean[:, :, :3], alone)
                )
                for start in (1, 4):
                    alone = vae.encode(video[:, :, 4 * start : 4 * start + 9]).mean
                    found.setdefault(f"latents {start} to {start + 2}", []).append(
                        deviation(whole[:, :, start : start + 3], alone)
                    )
        for part, values in found.items():
            sys.stdout.write(f"{name}, {part}: {min(values):.2g} to {max(values):.2g}\n")


if __name__ == "__main__":
    main()
