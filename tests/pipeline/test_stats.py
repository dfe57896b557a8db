"""Channel statistics: merged in any pieces they are what torch finds over all values at once."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.stats import ChannelStatistics


def latents(seed: int, sizes: list[int], scale: float, offset: float) -> list[torch.Tensor]:
    """Latents (3, T, 2, 3) with T from `sizes`, each channel at its own offset."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([offset, -offset, 0.0], dtype=torch.float64)[:, None, None, None]
    return [torch.randn(3, t, 2, 3, generator=generator, dtype=torch.float64) * scale + offsets for t in sizes]


def merged(parts: list[ChannelStatistics]) -> ChannelStatistics:
    total = ChannelStatistics()
    for part in parts:
        total = total.merge(part)
    return total


def assert_close(statistics: ChannelStatistics, values: torch.Tensor, scale: float, offset: float) -> None:
    """Against torch in float64, values (C, N)."""
    assert statistics.count == values.shape[1]
    magnitude = scale + abs(offset)
    np.testing.assert_allclose(statistics.mean, values.mean(1).numpy(), rtol=0, atol=1e-13 * magnitude)
    # what is left of 53 bits when squares of the offset would cancel: far more than a sum of squares would keep
    tolerance = 1e-10 * scale + 1e-15 * magnitude
    np.testing.assert_allclose(statistics.std, values.std(1, correction=0).numpy(), rtol=1e-9, atol=tolerance)
    assert statistics.minimum == tuple(values.amin(1).tolist())
    assert statistics.maximum == tuple(values.amax(1).tolist())


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 1000),
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    offset=st.sampled_from([0.0, 1.0, 1e6]),
)
def test_merging_equals_computing_at_once(seed: int, sizes: list[int], scale: float, offset: float) -> None:
    parts = latents(seed, sizes, scale, offset)
    values = torch.cat([part.flatten(1) for part in parts], dim=1)
    in_order = merged([ChannelStatistics.of(part) for part in parts])
    assert_close(in_order, values, scale, offset)
    half = len(parts) // 2
    pairs = merged([ChannelStatistics.of(p) for p in parts[:half]]).merge(
        merged([ChannelStatistics.of(p) for p in parts[half:]])
    )
    assert_close(pairs, values, scale, offset)
    assert merged([ChannelStatistics.of(part) for part in parts]) == in_order, "the same order gives the same bits"


def test_the_order_is_seen_in_the_last_bits() -> None:
    """Which is why callers merge in shard order: here some order gives other bits, and every order is as right."""
    parts = [ChannelStatistics.of(part) for part in latents(0, [1, 2, 3, 4], 1.0, 0.1)]
    totals = [merged(list(order)) for order in itertools.permutations(parts)]
    assert len({total.mean for total in totals}) > 1
    for total in totals:
        np.testing.assert_allclose(total.mean, totals[0].mean, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(total.m2, totals[0].m2, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_dtype_is_summed_in_float64(dtype: torch.dtype) -> None:
    """65,536 threes: a sum in float16 would stop growing at a few thousand."""
    latent = torch.ones(2, 4, 128, 128, dtype=dtype) * 3
    statistics = ChannelStatistics.of(latent)
    assert statistics == ChannelStatistics(
        count=65536, mean=(3.0, 3.0), m2=(0.0, 0.0), minimum=(3.0, 3.0), maximum=(3.0, 3.0)
    )
    assert statistics.std == (0.0, 0.0)


def test_nothing_is_neutral() -> None:
    one = ChannelStatistics.of(torch.arange(8.0).reshape(2, 1, 2, 2))
    assert one == ChannelStatistics(count=4, mean=(1.5, 5.5), m2=(5.0, 5.0), minimum=(0.0, 4.0), maximum=(3.0, 7.0))
    assert ChannelStatistics().merge(one) == one == one.merge(ChannelStatistics())
    assert ChannelStatistics().std == ()


def test_other_channels_are_refused() -> None:
    with pytest.raises(ValueError, match="2 and 3 channels"):
        ChannelStatistics.of(torch.zeros(2, 1, 1, 1)).merge(ChannelStatistics.of(torch.zeros(3, 1, 1, 1)))
