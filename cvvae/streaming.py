"""Running a causal model over a video chunk by chunk, with the numbers of one pass.

A step takes a chunk and the state after the chunk before (None for the first), and gives its answer and the state
after it. The state is a flat tuple of tensors and is never kept on a module: calls do not disturb each other.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cvvae.tiling import Tile, apply_time_tiles
from cvvae.vae import StreamState

Step = Callable[[Tensor, StreamState | None], tuple[Tensor, StreamState]]


def plan_chunks(num_frames: int, *, chunk: int) -> tuple[Tile, ...]:
    """The first frame alone, then `chunk` frames at a time; the last chunk may be shorter. Nothing overlaps."""
    if num_frames < 1 or chunk < 1:
        raise ValueError(f"plan_chunks: expected num_frames and chunk >= 1, got {num_frames} and {chunk}")
    rest = (Tile(start, min(start + chunk, num_frames), 0) for start in range(1, num_frames, chunk))
    return (Tile(0, 1, 0), *rest)


def apply_in_chunks(step: Step, x_BCTHW: Tensor, chunks: tuple[Tile, ...], *, num_frames_out: int) -> Tensor:
    """The answers of `step` for successive chunks of x, joined in time; memory as `apply_time_tiles` says."""
    state: StreamState | None = None

    def next_chunk(chunk_BCTHW: Tensor) -> Tensor:
        nonlocal state
        out_BCTHW, state = step(chunk_BCTHW, state)
        return out_BCTHW

    return apply_time_tiles(next_chunk, x_BCTHW, chunks, num_frames_out=num_frames_out)


def in_two_steps(step: Step, chunk_BCTHW: Tensor, state: StreamState | None) -> tuple[Tensor, StreamState]:
    """`step` for any chunk, where a first one may be longer than the single frame the step takes then."""
    if state is not None or chunk_BCTHW.shape[2] == 1:
        return step(chunk_BCTHW, state)
    first_BCTHW, state = step(chunk_BCTHW[:, :, :1], None)
    rest_BCTHW, state = step(chunk_BCTHW[:, :, 1:], state)
    return torch.cat([first_BCTHW, rest_BCTHW], dim=2), state
