"""Log variances in one byte each: a fixed grid, so that a stored number means the same in every shard.

A log variance needs few digits: it says how wide the noise is that a latent gets. On a grid of 1/8 the standard
deviation is at most 3.2 % off, and the Gaussian at most 0.001 nats from the one that is meant; docs/numerics.md has
what was measured. What a VAE gives outside of LOGVAR_LIMITS is stored as the nearest limit: below the lower one, the
noise is less than 1e-5 of a latent's unit either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

STEPS = 8
"""Of the grid in one nat."""
OFFSET = -8.0
LOGVAR_LIMITS = (OFFSET - 128 / STEPS, OFFSET + 127 / STEPS)


def logvar_to_int8(logvar: Tensor) -> Tensor:
    """The nearest number of the grid, any shape, int8. NaN must have been refused."""
    return ((logvar.float() - OFFSET) * STEPS).round().clamp(-128, 127).to(torch.int8)


def logvar_from_int8(code: Tensor) -> Tensor:
    """float32 log variances, exact: (code / 8) - 8."""
    return code.to(torch.float32) / STEPS + OFFSET
