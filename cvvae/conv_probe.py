"""A start-up check of half-precision 3-D convolutions: are they right, and do they run on a fast kernel?

They have been neither. cuDNN 9.8 to 9.10 gave wrong bf16 results; PyTorch 2.9.0 therefore stopped using cuDNN for it
and fell to a kernel that takes many times the time and memory (pytorch #163539, #166122); on CPUs with AMX, oneDNN
gave wrong bf16 results where a strided output is one pixel wide (#169688). Which versions do is not worth knowing:
a few small convolutions tell, in well under a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

MAX_RELATIVE_RMS = 0.02
"""bf16 keeps 8 bits: rounding alone gives 0.002 and less."""
MAX_SLOWDOWN = 3.0
_REPEATS = 5


class Convolve(Protocol):
    """F.conv3d, or what is tested in its place."""

    def __call__(self, input: Tensor, weight: Tensor, *, stride: tuple[int, int, int] = (1, 1, 1)) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class ConvProbe:
    """What was found."""

    relative_rms: float
    """Of the worst case, against fp32 on the CPU."""
    slowdown: float
    """Time over that of the same arithmetic done in 2-D convolutions, or in fp32 if that is faster still."""
    extra_bytes: int | None
    """Allocated beyond input, kernel and output by one call; None but on CUDA."""

    @property
    def is_wrong(self) -> bool:
        return not self.relative_rms <= MAX_RELATIVE_RMS  # NaN is wrong too

    @property
    def is_slow(self) -> bool:
        return self.slowdown > MAX_SLOWDOWN


@torch.inference_mode()
def probe_conv3d(
    dtype: torch.dtype,
    device: torch.device,
    memory_format: torch.memory_format,
    *,
    convolve: Convolve = F.conv3d,
) -> ConvProbe:
    """Run kernel-3 convolutions of the kinds an encoder has, in `dtype` on `device`."""
    on_gpu = device.type == "cuda"
    channels = (128, 512) if on_gpu else (32,)
    cases = [(width, shape, stride) for width in channels for shape, stride in _CASES]
    worst = 0.0
    for width, shape, stride in cases:
        error = _relative_rms(convolve, _tensors(width, shape, dtype), stride, device, memory_format)
        worst = error if error != error else max(worst, error)
        if worst != worst:
            break
    width, shape = (128, (6, 98, 98)) if on_gpu else (32, (6, 26, 26))
    x, kernel = (t.to(device, memory_format=memory_format) for t in _tensors(width, shape, dtype))
    seconds = _best_seconds(lambda: convolve(x, kernel), device)
    others = (
        _best_seconds(lambda: _in_two_dimensions(x, kernel), device),
        _best_seconds(lambda: F.conv3d(x.float(), kernel.float()), device),
    )
    extra = _extra_bytes(lambda: convolve(x, kernel), device) if on_gpu else None
    return ConvProbe(worst, seconds / min(others), extra)


# (T, H, W) and stride: most layers; the downsamplers; a downsampler whose output is one pixel wide
_CASES = (
    ((5, 18, 18), (1, 1, 1)),
    ((5, 17, 17), (2, 2, 2)),
    ((5, 17, 3), (1, 2, 2)),
)


def _tensors(channels: int, shape: tuple[int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An input and a kernel on the CPU, their values rounded to `dtype`."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, *shape, generator=generator)
    kernel = torch.randn(channels, channels, 3, 3, 3, generator=generator) / (27 * channels) ** 0.5
    return x.to(dtype), kernel.to(dtype)


def _relative_rms(
    convolve: Convolve,
    tensors: tuple[Tensor, Tensor],
    stride: tuple[int, int, int],
    device: torch.device,
    memory_format: torch.memory_format,
) -> float:
    x, kernel = tensors
    exact = F.conv3d(x.float(), kernel.float(), stride=stride)
    got = convolve(
        x.to(device, memory_format=memory_format), kernel.to(device, memory_format=memory_format), stride=stride
    )
    error = got.float().cpu() - exact
    return (error.square().mean() / exact.square().mean()).sqrt().item()


def _in_two_dimensions(x: Tensor, kernel: Tensor) -> Tensor:
    """The same multiplications as three 2-D convolutions of all frames, one for each frame of the kernel."""
    num_frames = x.shape[2] - 2
    out = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap, kernel_2d in enumerate(kernel.unbind(2)):
        frames = x[0, :, tap : tap + num_frames].transpose(0, 1)
        out = out + F.conv2d(frames, kernel_2d)
    return out


def _best_seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    run()
    best = float("inf")
    for _ in range(_REPEATS):
        _wait(device)
        started = time.perf_counter()
        run()
        _wait(device)
        best = min(best, time.perf_counter() - started)
    return best


def _extra_bytes(run: Callable[[], Tensor], device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    out = run()
    return torch.cuda.max_memory_allocated(device) - before - out.nbytes


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
