"""When a run stops because too much is rejected, instead of paying for a cluster that makes nothing.

A wrong setting or a broken source rejects nearly everything, and nothing else ends such a run early. What is counted
is this run's own receipts: a run that is started again begins with an empty account, so that it can go on after the
cause is mended, or with a larger budget.
"""

from __future__ import annotations

from collections import Counter
from typing import Annotated

from pydantic import Field

from pipeline.documents import Counts, ShardReceipt
from pipeline.errors import ErrorBudgetExceeded, RejectionClass
from pipeline.policies import Policy

EXAMPLES = 3
Share = Annotated[float, Field(gt=0, le=1)]


class ErrorBudget(Policy):
    """How large a share of the samples may be rejected before the run stops. Committed shards stay."""

    max_share: Share | None = 0.5
    """Of the samples that are not upstream_failed, of all other classes together; for windows that are rejected by
    themselves, of the windows. null: no limit."""
    max_upstream_failed_share: Share | None = None
    """Of all samples: those that the downloader itself marked as failed, which are in no other share."""
    max_share_by_class: dict[RejectionClass, Share] = Field(default_factory=dict)
    """Further limits, such as {timeout: 0.01}: of the samples, or of the windows where that is what the class
    rejects."""
    min_samples: Annotated[int, Field(ge=1)] = 1000
    """Nothing is judged before so many samples of this run have come to an end."""


class BudgetMeter:
    """Receipts against a budget."""

    def __init__(self, budget: ErrorBudget) -> None:
        self._budget = budget
        self._counts = Counts()
        self._classes: Counter[str] = Counter()
        self._window_classes: Counter[str] = Counter()
        self._examples: dict[str, list[str]] = {}

    def spend(self, receipt: ShardReceipt) -> None:
        """ErrorBudgetExceeded, with a summary, once a share is above its limit."""
        self._counts = self._counts.plus(receipt.counts)
        for rejection in receipt.rejections:
            if rejection.scope == "shard":
                continue  # a broken tar; its lost samples are rejections of their own
            classes = self._window_classes if rejection.scope == "window" else self._classes
            classes[rejection.error_class] += 1
            examples = self._examples.setdefault(rejection.error_class, [])
            if len(examples) < EXAMPLES:
                examples.append(f"{receipt.shard_id} {rejection.key}: {rejection.message}")
        if self._counts.samples >= self._budget.min_samples:
            self._judge()

    def _judge(self) -> None:
        budget, upstream = self._budget, self._classes[RejectionClass.UPSTREAM_FAILED]
        samples, windows = self._counts.samples, self._counts.windows_decoded
        others = sum(self._classes.values()) - upstream
        of_windows = sum(self._window_classes.values())
        self._limit("max_share", budget.max_share, others, samples - upstream, "samples")
        self._limit("max_share", budget.max_share, of_windows, windows, "windows")
        self._limit("max_upstream_failed_share", budget.max_upstream_failed_share, upstream, samples, "samples")
        for name, share in budget.max_share_by_class.items():
            where = f"max_share_by_class.{name.value}"
            self._limit(where, share, self._classes[name], samples, "samples")
            self._limit(where, share, self._window_classes[name], windows, "windows")

    def _limit(self, setting: str, share: float | None, rejected: int, total: int, of: str) -> None:
        if share is not None and total and rejected > share * total:
            raise ErrorBudgetExceeded(
                f"error_budget.{setting}: {rejected} of {total} {of} were rejected, {rejected / total:.1%}; the "
                f"limit is {share:.1%}. {self._summary()}\n"
                "Committed shards stay. Mend the cause or raise the limit, and start the same command again."
            )

    def _summary(self) -> str:
        lines = ["Rejected in this run, by class:"]
        for name, number in (self._classes + self._window_classes).most_common():
            lines.append(f"  {name}: {number}")
            lines += [f"    {example}" for example in self._examples.get(name, ())]
        return "\n".join(lines)
