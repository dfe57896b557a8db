"""Learning rates as functions of the step, so that a resumed run needs no scheduler's state."""

from __future__ import annotations

import math

import torch

from pipeline.training.settings import OptimizerSettings


def rate_at(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """The rate of step `step` (from 0) of a run of `num_steps`: a linear warm-up, then a cosine down to
    lr * floor at `schedule_steps`, or constant."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    last = settings.schedule_steps or num_steps
    done = (step - settings.warmup_steps) / max(1, last - settings.warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return settings.lr * (settings.floor + (1.0 - settings.floor) * cosine)


def adamw(parameters: list[torch.nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    """AdamW over those of the parameters that are trained."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return torch.optim.AdamW(
        trained, lr=settings.lr, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
