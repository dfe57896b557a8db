"""The moving average of a model's weights (LDM's LitEma): what is evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """average <- d * average + (1 - d) * weights, where d rises to `decay` as (1 + n) / (10 + n) over n updates."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.values = {name: value.detach().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        for name, value in model.named_parameters():
            self.values[name].lerp_(value.detach(), 1.0 - decay)

    @contextmanager
    def in_place_of(self, model: nn.Module) -> Iterator[None]:
        """The model has the average's weights while the body runs."""
        own = {name: value.detach().clone() for name, value in model.named_parameters()}
        _write(model, self.values)
        try:
            yield
        finally:
            _write(model, own)

    def load(self, values: Mapping[str, Tensor], num_updates: int) -> None:
        """What a checkpoint kept."""
        self.num_updates = num_updates
        for name, value in self.values.items():
            value.copy_(values[name])


@torch.no_grad()
def _write(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(values[name])
