"""What every benchmark prints: its tables, with the machine they were measured on; figures put side by side."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

FAST_BF16 = ("amx_bf16", "avx512_bf16", "bf16")
"""CPU features with which bf16 is faster than fp32; the last is Arm's."""
_SHOWN_FEATURES = ("avx2", "avx512f", *FAST_BF16, "avx512_fp16", "amx_tile")


@dataclass(slots=True)
class BenchTable:
    """A table as Markdown, columns padded so that a terminal shows it too. Cells arrive formatted."""

    title: str
    headings: tuple[str, ...]
    labels: int = 1
    """The first columns are text and stand left; figures stand right."""
    rows: list[tuple[str, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: str) -> None:
        if len(cells) != len(self.headings):
            raise ValueError(f"{self.title}: expected {len(self.headings)} cells, got {len(cells)}")
        self.rows.append(cells)

    def __str__(self) -> str:
        columns = list(zip(self.headings, *self.rows, strict=True))
        widths = [max(3, *(len(cell) for cell in column)) for column in columns]
        rule = tuple("-" * width if n < self.labels else f"{'-' * (width - 1)}:" for n, width in enumerate(widths))
        lines = [self._line(cells, widths) for cells in (self.headings, rule, *self.rows)]
        return "\n".join([f"\n{self.title}:\n", *lines, *(f"\n{note}" for note in self.notes)])

    def _line(self, cells: tuple[str, ...], widths: list[int]) -> str:
        sized = zip(cells, widths, strict=True)
        padded = (
            cell.ljust(width) if n < self.labels else cell.rjust(width) for n, (cell, width) in enumerate(sized)
        )
        return f"| {' | '.join(padded)} |"


def machine() -> str:
    """The CPU or GPU, its cores and what of its features matters here, and PyTorch's version, in one line."""
    features = [name for name in _SHOWN_FEATURES if name in cpu_features()]
    parts = [cpu_model(), f"{usable_cores()} cores", " ".join(features) or "no vector features known"]
    parts.append(f"torch {torch.__version__}")
    if torch.cuda.is_available():
        parts += [
            torch.cuda.get_device_name(),
            f"CUDA {torch.version.cuda}",
            f"cuDNN {torch.backends.cudnn.version()}",
        ]
    return ", ".join(parts)


def cpu_model() -> str:
    return _cpu_line("model name") or platform.processor() or platform.machine()


def cpu_features() -> frozenset[str]:
    """The CPU's flags as the kernel names them; empty where /proc/cpuinfo does not exist."""
    return frozenset((_cpu_line("flags") or _cpu_line("Features") or "").split())


def has_fast_bf16() -> bool:
    return not cpu_features().isdisjoint(FAST_BF16)


def usable_cores() -> int:
    """Cores this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_line(name: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = (line.split(":", 1)[1].strip() for line in text.splitlines() if line.partition(":")[0].strip() == name)
    return next(found, None)


def ratio_text(of: Sequence[float], to: Sequence[float]) -> str:
    """The median of `of[i] / to[i]`, measured side by side in round i, and the lowest and highest of them."""
    ratios = [one / other for one, other in zip(of, to, strict=True)]
    middle = f"{statistics.median(ratios):.2f}"
    return middle if len(ratios) == 1 else f"{middle} ({min(ratios):.2f} to {max(ratios):.2f})"


def peak_rss_mib(pid: int | str = "self") -> float | None:
    """The most resident memory a process has had since `reset_peak_rss`, or since it started. None but on Linux.

    Not getrusage: a child's ru_maxrss starts at what its parent had when it was forked.
    """
    return _memory_mib(pid, "VmHWM")


def rss_mib(pid: int | str = "self") -> float | None:
    """Resident memory of a process now. None but on Linux."""
    return _memory_mib(pid, "VmRSS")


def reset_peak_rss() -> None:
    """Let this process's peak start at what it has now; without effect where the kernel cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def return_free_memory() -> None:
    """Give freed memory back to the system, so that resident memory is what is in use. Only with glibc."""
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _memory_mib(pid: int | str, name: str) -> float | None:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kibibytes = next((line.split()[1] for line in text.splitlines() if line.startswith(f"{name}:")), None)
    return None if kibibytes is None else int(kibibytes) / 1024


def mib_text(mib: float | None) -> str:
    return "not known" if mib is None else f"{mib:.0f}"
