"""What the plain transcriptions share: weights by key, and the steps that PyTorch has no single call for.

Frozen, as they are: contiguous copies and separate steps on purpose. Layouts: x (B, C, T, H, W);
frames (B*T, C, H, W).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor


class PlainWeights:
    """Tensors by key, as `VideoVAE.state_dict` gives them."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._weights = {key: tensor.detach().contiguous() for key, tensor in weights.items()}

    def __getitem__(self, key: str) -> Tensor:
        return self._weights[key]

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of a layer; some convolutions have no bias."""
        return self._weights[f"{name}.weight"], self._weights.get(f"{name}.bias")

    def group_norm(self, x: Tensor, name: str, *, groups: int, eps: float) -> Tensor:
        return F.group_norm(x, groups, *self.of(name), eps=eps)


def swish(x: Tensor) -> Tensor:
    """x * sigmoid(x), in two steps."""
    return x * torch.sigmoid(x)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One head of attention over (N, tokens, C)."""
    return F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]


def fold(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W), a copy."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def unfold(frames: Tensor, batch: int) -> Tensor:
    """(B*T, C, H, W) -> (B, C, T, H, W), a copy."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2).contiguous()
