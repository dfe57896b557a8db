"""Memory of batches, used again once nobody has them any more.

Fresh memory costs a page fault every 4 KiB, for large batches several times what it costs to read them. So what a
batch was in is kept for the next one. In a DataLoader's worker a batch is made in shared memory at once, which spares
the copy into it on the way to the trainer; there it cannot be known when the trainer is done with it.
"""

from __future__ import annotations

import math
import threading
import weakref

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

KEPT = 4
"""Blocks of memory that wait for a batch: those in the making, and one that the trainer has let go."""


class BatchMemory:
    """Gives out tensors; any thread may ask, and any may drop the last reference to one."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        # a garbage collection may give a block back while this very thread holds the lock
        self._lock = threading.RLock()

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Of any content. It stays the caller's for as long as it, its storage, or a view of it is referred to."""
        nbytes = math.prod(shape) * dtype.itemsize
        if get_worker_info() is not None:
            storage = torch.UntypedStorage._new_shared(nbytes)  # as torch's own default_collate does
            return torch.empty(0, dtype=torch.uint8).set_(storage).view(dtype).view(shape)
        block = self._taken(nbytes)
        view = block[:nbytes]
        weakref.finalize(view, self._give_back, block).atexit = False
        return torch.from_numpy(view).view(dtype).view(shape)

    def _taken(self, nbytes: int) -> np.ndarray:
        """The smallest free block that is large enough, or a new one."""
        with self._lock:
            fitting = [block for block in self._free if len(block) >= nbytes]
            if fitting:
                smallest = min(fitting, key=len)
                self._free = [block for block in self._free if block is not smallest]
                return smallest
        return np.empty(nbytes, np.uint8)

    def _give_back(self, block: np.ndarray) -> None:
        with self._lock:
            self._free.append(block)
            if len(self._free) > KEPT:
                self._free = sorted(self._free, key=len)[1:]
