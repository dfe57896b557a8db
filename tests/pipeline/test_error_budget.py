"""A run that rejects too much stops; what the downloader lost is judged apart."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipeline.documents import Counts, RejectionRecord, ShardReceipt
from pipeline.error_budget import BudgetMeter, ErrorBudget
from pipeline.errors import ErrorBudgetExceeded
from tests.pipeline.example_documents import receipt


def shard(samples: int, windows: int = 0, **rejected: int) -> ShardReceipt:
    """`rejected` by class; non_finite ones are windows."""
    records = [
        RejectionRecord(
            key=f"k{number}",
            scope="window" if name == "non_finite" else "clip",
            stage="decode",
            error_class=name,
            message=f"why {name}",
        )
        for name, count in rejected.items()
        for number in range(count)
    ]
    clips = sum(record.scope == "clip" for record in records)
    counts = Counts(samples=samples, clips_encoded=samples - clips, clips_rejected=clips, windows_decoded=windows)
    return receipt(counts=counts, rejections=tuple(records))


def spend(budget: ErrorBudget, *receipts: ShardReceipt) -> None:
    meter = BudgetMeter(budget)
    for one in receipts:
        meter.spend(one)


def test_too_much_of_everything_stops_with_a_summary() -> None:
    budget = ErrorBudget(max_share=0.3, min_samples=20)
    spend(budget, shard(20, timeout=4, too_short=2))
    with pytest.raises(ErrorBudgetExceeded) as caught:
        spend(budget, shard(20, timeout=4), shard(20, timeout=5, too_short=5))
    text = str(caught.value)
    assert "error_budget.max_share: 14 of 40 samples were rejected, 35.0%; the limit is 30.0%" in text
    assert "timeout: 9" in text
    assert "00000 k0: why timeout" in text
    assert "start the same command again" in text


def test_nothing_is_judged_too_early() -> None:
    spend(ErrorBudget(max_share=0.1, min_samples=100), shard(99, timeout=99))


def test_upstream_failures_are_a_share_of_their_own() -> None:
    """They neither count as errors of this run nor thin out those that do."""
    lost = shard(100, upstream_failed=90)
    spend(ErrorBudget(max_share=0.1, min_samples=10), lost)
    with pytest.raises(ErrorBudgetExceeded, match="max_share: 2 of 10 samples"):
        spend(ErrorBudget(max_share=0.1, min_samples=10), shard(100, upstream_failed=90, timeout=2))
    with pytest.raises(ErrorBudgetExceeded, match="max_upstream_failed_share: 90 of 100"):
        spend(ErrorBudget(max_upstream_failed_share=0.5, min_samples=10), lost)


def test_windows_are_judged_as_windows() -> None:
    budget = ErrorBudget.model_validate({"max_share_by_class": {"non_finite": 0.2}, "min_samples": 10})
    spend(budget, shard(10, windows=100, non_finite=20))
    with pytest.raises(ErrorBudgetExceeded, match=r"by_class\.non_finite: 21 of 100 windows"):
        spend(budget, shard(10, windows=100, non_finite=21))
    with pytest.raises(ErrorBudgetExceeded, match="max_share: 51 of 100 windows"):
        spend(ErrorBudget(min_samples=10), shard(10, windows=100, non_finite=51))


def test_a_class_may_have_its_own_limit_or_none() -> None:
    budget = ErrorBudget.model_validate({"max_share": None, "max_share_by_class": {"timeout": 0.01}})
    spend(budget, shard(1000, too_short=1000), shard(1000, timeout=20))
    with pytest.raises(ErrorBudgetExceeded, match=r"by_class\.timeout: 11 of 1000"):
        spend(budget, shard(1000, timeout=11))


def test_a_class_that_is_none_is_refused() -> None:
    with pytest.raises(ValidationError, match="max_share_by_class"):
        ErrorBudget.model_validate({"max_share_by_class": {"time_out": 0.1}})
