"""Memory that comes back: never while anything refers to it."""

from __future__ import annotations

import gc

import torch

from pipeline.reader.batch_memory import KEPT, BatchMemory


def test_memory_comes_back_once_the_last_view_is_gone() -> None:
    memory = BatchMemory()
    first = memory.empty((4, 8), torch.float16)
    place, view = first.data_ptr(), first[2:, 3].numpy()
    del first
    other = memory.empty((4, 8), torch.float16)
    assert other.data_ptr() != place
    del view
    gc.collect()
    again = memory.empty((2, 8), torch.float32)
    assert again.data_ptr() == place
    assert (again.shape, again.dtype) == ((2, 8), torch.float32)


def test_the_smallest_block_that_is_large_enough_is_used_and_few_are_kept() -> None:
    memory = BatchMemory()
    made = [memory.empty((size,), torch.uint8) for size in (10, 1000, 100, 5000, 2000, 3000)]
    places = {len(one): one.data_ptr() for one in made}
    made.clear()
    assert memory.empty((50,), torch.uint8).data_ptr() == places[1000]  # 10 and 100 were let go: KEPT is 4
    assert KEPT == 4
    assert memory.empty((4000,), torch.uint8).data_ptr() == places[5000]
