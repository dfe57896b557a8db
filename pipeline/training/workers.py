"""The workers of a run, as the loop sees them: gradients averaged, small objects gathered. torch.distributed only.

Gradients are averaged once per step, after accumulation, instead of by a wrapper around the model: encoder, decoder
and regularization are separate calls, half of the steps train the other player, and one worker then runs the very
code of many. What it gives up is the overlap of that transfer with the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_ELEMENTS = 16 << 20
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Workers:
    """This process among the `size` that share a run."""

    rank: int = 0
    size: int = 1
    device: torch.device = CPU

    @classmethod
    def joined(cls, device: torch.device) -> Workers:
        """Of the process group that this process has joined."""
        return cls(dist.get_rank(), dist.get_world_size(), device)

    @property
    def is_first(self) -> bool:
        """Whether this one writes checkpoints and metrics."""
        return self.rank == 0

    def mean(self, tensor: Tensor) -> Tensor:
        """The tensor's mean over all workers, on each."""
        if self.size == 1:
            return tensor
        total = tensor.detach().clone()
        dist.all_reduce(total)
        return total / self.size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """In place. Parameters without a gradient are left out: they are the same on every worker."""
        if self.size == 1:
            return
        bucket: list[Tensor] = []
        for parameter in parameters:
            if parameter.grad is None:
                continue
            bucket.append(parameter.grad)
            if sum(gradient.numel() for gradient in bucket) >= BUCKET_ELEMENTS:
                self._average(bucket)
                bucket = []
        self._average(bucket)

    def _average(self, gradients: list[Tensor]) -> None:
        if not gradients:
            return
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        for gradient, part in zip(gradients, flat.split([each.numel() for each in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def gather(self, value: Any) -> list[Any]:
        """Every worker's small object, by rank, on each."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def first_says(self, value: Any) -> Any:
        """The first worker's object, on each."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]
