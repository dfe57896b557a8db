"""What became of every sample of a shard. Its counts go into the receipt and must add up."""

from __future__ import annotations

from dataclasses import dataclass, field

from pipeline.decode.clips import ClipSummary
from pipeline.decode.pool import ClipDone
from pipeline.documents import Counts
from pipeline.errors import RejectionClass
from pipeline.records import LatentRow, Rejection


@dataclass(eq=False, slots=True)
class ClipAttempt:
    """One pass over a clip by one decoder. Its windows count only while it is valid."""

    valid: bool = True
    stored: list[LatentRow] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)


class ClipLost(Exception):
    """A clip ended its decode children after it had given windows."""

    def __init__(self, rejection: Rejection) -> None:
        super().__init__(rejection.message)
        self.rejection = rejection


TIMING_DEPENDENT = frozenset(
    name.value for name in (RejectionClass.TIMEOUT, RejectionClass.OUT_OF_MEMORY, RejectionClass.DECODER_CRASHED)
)


class ShardLedger:
    """Collects outcomes while a shard is encoded; reads them out once it is done."""

    def __init__(self, shard_id: str) -> None:
        self.shard_id = shard_id
        self._attempts: dict[str, ClipAttempt] = {}
        self._summaries: list[ClipSummary] = []
        self._refused: list[Rejection] = []
        self._gave_windows: set[str] = set()
        """Keys of clips that gave windows in any attempt."""

    def attempt(self, clip_key: str) -> ClipAttempt:
        """The valid attempt at a clip that has given a window."""
        self._gave_windows.add(clip_key)
        return self._attempts.setdefault(clip_key, ClipAttempt())

    def retract(self, clip_key: str) -> None:
        """The windows a clip has given so far are void."""
        attempt = self._attempts.pop(clip_key, None)
        if attempt is not None:
            attempt.valid = False

    def finish(self, done: ClipDone) -> None:
        """A clip came to its end: encoded, or rejected as a whole.

        ClipLost if it is rejected for something that depends on timing after it has given windows: how many of them
        reached the batches is chance, so the shard must be encoded again without the clip.
        """
        if done.rejection is not None:
            if done.rejection.error_class in TIMING_DEPENDENT and done.clip.key in self._gave_windows:
                raise ClipLost(done.rejection)
            self.retract(done.clip.key)
            self._refused.append(done.rejection)
        else:
            assert done.summary is not None, "a clip that is not rejected has a summary"
            self._summaries.append(done.summary)

    def reject_sample(self, rejection: Rejection) -> None:
        """A sample refused while reading, or the rest of a broken shard (scope "shard")."""
        self._refused.append(rejection)

    def reject_window(self, rejection: Rejection, attempt: ClipAttempt) -> None:
        attempt.rejected.append(rejection)

    def store_window(self, row: LatentRow, attempt: ClipAttempt) -> None:
        attempt.stored.append(row)

    def stored_rows(self) -> list[LatentRow]:
        """The rows that count. A retracted attempt may have left others with the same keys in the spool."""
        return [row for attempt in self._attempts.values() for row in attempt.stored]

    def rejections(self) -> list[Rejection]:
        """In an order that does not depend on timing."""
        windows = [rejection for attempt in self._attempts.values() for rejection in attempt.rejected]
        return sorted(
            self._refused + windows, key=lambda r: (r.scope == "shard", r.key, r.scope, r.error_class, r.message)
        )

    def counts(self) -> Counts:
        rows = self.stored_rows()
        rejected_clips = sum(rejection.scope == "clip" for rejection in self._refused)
        return Counts(
            samples=len(self._summaries) + rejected_clips,
            clips_encoded=len(self._summaries),
            clips_rejected=rejected_clips,
            windows_decoded=sum(summary.windows for summary in self._summaries),
            windows_stored=len(rows),
            windows_rejected=sum(len(attempt.rejected) for attempt in self._attempts.values()),
            frames_decoded=sum(summary.decoded_frames for summary in self._summaries),
            frames_sampled=sum(summary.sampled_frames for summary in self._summaries),
            frames_stored=sum(row.num_frames for row in rows),
            frames_padded=sum(row.padded_frames for row in rows),
            frames_dropped_tail=sum(
                summary.dropped_tail_frames + summary.trimmed_frames for summary in self._summaries
            ),
            frames_unused=sum(summary.unused_frames for summary in self._summaries),
            clips_cut_short=sum(summary.stopped_early for summary in self._summaries),
        )
