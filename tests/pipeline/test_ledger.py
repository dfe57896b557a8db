"""The ledger: whatever happens to clips and windows, in whatever order, the counts add up and nothing is lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.decode.blob import Blob
from pipeline.decode.clips import ClipSummary
from pipeline.decode.pool import ClipDone
from pipeline.ledger import ClipLost, ShardLedger
from pipeline.manifest import rows_per_bucket, rows_per_decoder
from pipeline.records import Clip, LatentRow, Rejection, SourceVideo


def clip(key: str) -> Clip:
    return Clip(
        key=key,
        shard_id="0",
        video=Blob.from_bytes(b""),
        video_sha256="",
        file_name="",
        caption="",
        metadata={},
    )


def row(clip_key: str, index: int, *, decoder: str = "pyav-18", height: int = 64, padded: int = 0) -> LatentRow:
    video = SourceVideo(
        width=1, height=1, sample_aspect_ratio=1.0, rotation=0, fps=None, duration=None, codec="", decoder=decoder
    )
    fields: dict[str, Any] = dict.fromkeys(LatentRow.__dataclass_fields__, ())
    fields |= {"key": f"{clip_key}_{index:05d}", "clip_key": clip_key, "window_index": index, "source": video}
    fields |= {"num_frames": 17, "height": height, "width": 64, "padded_frames": padded}
    return LatentRow(**fields)


def rejected(key: str, scope: Any = "clip", error_class: str = "corrupt_frames") -> Rejection:
    return Rejection(key=key, shard_id="0", scope=scope, stage="decode", error_class=error_class, message="")


def summary(windows: int, **changes: int) -> ClipSummary:
    fields: dict[str, Any] = {
        "decoder": "pyav-18",
        "decoded_frames": 20 * windows,
        "sampled_frames": 18 * windows,
        "windows": windows,
        "dropped_tail_frames": 0,
        "padded_frames": 0,
        "trimmed_frames": 0,
        "unused_frames": 0,
        "stopped_early": False,
    }
    return ClipSummary(**fields | changes)


attempts = st.lists(st.booleans(), max_size=5)
"""Per window of an attempt: stored, or rejected as not finite."""
clips = st.tuples(st.lists(attempts, max_size=2), st.none() | attempts)
"""Attempts that are retracted, then the one that counts; None: the clip is refused in the end."""


@settings(max_examples=200, deadline=None)
@given(plans=st.lists(clips, max_size=6), refused_while_reading=st.integers(0, 3), broken=st.booleans())
def test_counts_add_up_whatever_happens(plans: list[Any], refused_while_reading: int, broken: bool) -> None:
    ledger = ShardLedger("0")
    stored, void = [], []
    for number, (retracted, last) in enumerate(plans):
        one = clip(f"c{number}")
        for windows in [*retracted, last]:
            attempt = ledger.attempt(one.key)
            for index, finite in enumerate(windows or []):
                window = row(one.key, index)
                if finite:
                    ledger.store_window(window, attempt)
                    (stored if windows is last else void).append(window)
                else:
                    ledger.reject_window(rejected(window.key, "window", "non_finite"), attempt)
            if windows is not last:
                ledger.retract(one.key)
                assert not attempt.valid
        if last is None:
            ledger.finish(ClipDone(one, rejection=rejected(one.key)))
        else:
            assert ledger.attempt(one.key).valid
            ledger.finish(ClipDone(one, summary=summary(len(last))))
        one.video.close()
    for number in range(refused_while_reading):
        ledger.reject_sample(rejected(f"r{number}", error_class="no_video"))
    if broken:
        ledger.reject_sample(rejected("", "shard", "truncated_shard"))

    counts = ledger.counts()
    counts.check("shard 0")
    finished = [last for _, last in plans if last is not None]
    assert counts.samples == len(plans) + refused_while_reading, "the rest of a broken shard is no sample"
    assert counts.clips_encoded == len(finished)
    assert counts.windows_stored == sum(map(sum, finished)) == len(stored)
    assert counts.windows_decoded == sum(map(len, finished))
    assert counts.frames_stored == 17 * len(stored)
    assert all(any(row is window for row in ledger.stored_rows()) for window in stored)
    assert not any(row is window for row in ledger.stored_rows() for window in void), (
        "not even where the key is the same"
    )
    scopes = [rejection.scope for rejection in ledger.rejections()]
    assert scopes.count("clip") == counts.clips_rejected
    assert scopes.count("window") == counts.windows_rejected
    assert scopes.count("shard") == broken


@given(st.permutations(range(8)))
def test_the_order_of_rejections_does_not_depend_on_timing(order: list[int]) -> None:
    all_of_them = [
        rejected("", "shard", "truncated_shard"),
        rejected("a"),
        rejected("a", error_class="duplicate_key"),
        rejected("a_00000", "window"),
        rejected("b"),
        rejected("b", "window"),
        rejected("c"),
        rejected("d", error_class="no_video"),
    ]
    ledger = ShardLedger("0")
    for number in order:
        ledger.reject_sample(all_of_them[number])
    in_order = ShardLedger("0")
    for one in all_of_them:
        in_order.reject_sample(one)
    assert ledger.rejections() == in_order.rejections()
    assert ledger.rejections()[-1].scope == "shard"


def test_totals_by_bucket_decoder_and_frame() -> None:
    ledger = ShardLedger("0")
    one = clip("a")
    attempt = ledger.attempt("a")
    for window in (row("a", 0, padded=3), row("a", 1, height=48), row("a", 2, decoder="decord-0.6")):
        ledger.store_window(window, attempt)
    ledger.finish(
        ClipDone(
            one, summary=summary(3, dropped_tail_frames=2, trimmed_frames=5, unused_frames=4, stopped_early=True)
        )
    )
    one.video.close()
    assert rows_per_bucket(ledger.stored_rows()) == {"00017x00048x00064": 1, "00017x00064x00064": 2}
    assert rows_per_decoder(ledger.stored_rows()) == {"decord-0.6": 1, "pyav-18": 2}
    counts = ledger.counts()
    assert (counts.frames_decoded, counts.frames_sampled, counts.frames_padded) == (60, 54, 3)
    assert (counts.frames_dropped_tail, counts.frames_unused, counts.clips_cut_short) == (7, 4, 1)


def test_a_clip_refused_at_its_end_takes_its_windows_along() -> None:
    ledger = ShardLedger("0")
    one = clip("a")
    window = row("a", 0)
    ledger.store_window(window, ledger.attempt("a"))
    ledger.finish(ClipDone(one, rejection=rejected("a")))
    one.video.close()
    assert ledger.stored_rows() == []
    assert ledger.counts().windows_stored == 0
    assert rows_per_bucket(ledger.stored_rows()) == {}


def test_a_clip_must_end_one_way() -> None:
    one = clip("a")
    with pytest.raises(AssertionError):
        ShardLedger("0").finish(ClipDone(one))
    one.video.close()


@pytest.mark.parametrize("error_class", ["timeout", "out_of_memory", "decoder_crashed"])
def test_a_clip_lost_to_timing_after_it_gave_windows_starts_the_shard_over(error_class: str) -> None:
    """How many of its windows reached the batches is chance; one that gave none is an ordinary rejection."""
    ledger = ShardLedger("0")
    silent, talking = clip("silent"), clip("talking")
    ledger.finish(ClipDone(silent, rejection=rejected("silent", error_class=error_class)))
    ledger.attempt("talking")
    ledger.retract("talking")
    with pytest.raises(ClipLost) as caught:
        ledger.finish(ClipDone(talking, rejection=rejected("talking", error_class=error_class)))
    assert caught.value.rejection.key == "talking"
    for one in (silent, talking):
        one.video.close()
