"""The plan of batches: every row once per epoch, whoever computes it, and the same from any point on."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.reader.plan import (
    ANY_EPOCH,
    FEW_READS,
    STREAMS,
    BatchPlan,
    BucketRows,
    OrderSettings,
    Share,
    random_order,
    shuffled_keys,
)

ROW_BYTES = 64 << 10


def bucket(name: str, *rows: int, row_bytes: int = ROW_BYTES) -> BucketRows:
    """Shard n has rows[n] rows, from row 100 * n on."""
    return BucketRows(
        name=name,
        row_bytes=row_bytes,
        shard=np.arange(len(rows)),
        first=100 * np.arange(len(rows)),
        rows=np.asarray(rows),
    )


def rows_of(share: Share) -> list[tuple[int, int, int]]:
    """(bucket, shard, row), padding left out."""
    found = zip(share.pieces, share.rows, share.is_padding, strict=True)
    return [(share.bucket, piece.shard, row) for piece, row, padding in found if not padding]


@st.composite
def plans(draw: st.DrawFn) -> BatchPlan:
    shards = st.lists(st.integers(1, 60), min_size=1, max_size=6)
    buckets = [bucket(f"b{number}", *draw(shards)) for number in range(draw(st.integers(1, 3)))]
    order = OrderSettings(
        seed=draw(st.integers(0, 2**32)),
        batch_size=draw(st.sampled_from([1, 2, 4, 6, 12])),
        shuffle=draw(st.booleans()),
        tail=draw(st.sampled_from(["drop", "pad"])),
        buffer_bytes=draw(st.sampled_from([1, 64 << 20, 1 << 30])),
    )
    return BatchPlan(tuple(buckets), order)


@settings(deadline=None)  # a shared machine may stand still for longer
@given(plans(), st.data())
def test_each_row_once_per_epoch_over_all_ranks_workers_and_resumes(plan: BatchPlan, data: st.DataObject) -> None:
    """Ranks and workers change at a random batch; together they see what one process sees."""
    size, total = plan.settings.batch_size, plan.batches_per_epoch
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    resume = data.draw(st.integers(0, total))
    epoch = plan.epoch(data.draw(st.integers(0, 3)))
    seen: list[tuple[int, int, int]] = []
    for start, stop in ((0, resume), (resume, total)):
        ranks, workers = data.draw(st.sampled_from(divisors)), data.draw(st.integers(1, 5))
        for step in range(start, stop):
            assert (step - start) % workers < workers
            shares = [epoch.share(step, plan.lanes(rank, ranks)) for rank in range(ranks)]
            assert {share.bucket for share in shares} == {epoch.bucket_of(step)}
            assert tuple(row for share in shares for row in share.rows) == epoch.share(step, range(size)).rows
            seen += [row for share in shares for row in rows_of(share)]
    expected = {
        (number, shard, int(one.first[shard]) + row)
        for number, one in enumerate(plan.buckets)
        for shard in range(len(one.rows))
        for row in range(one.rows[shard])
    }
    counts = Counter(seen)
    assert set(counts.values()) <= {1}
    if plan.settings.tail == "pad":
        assert set(counts) == expected
    else:
        missing = Counter(plan.buckets[number].name for number, _, _ in expected - set(counts))
        assert dict(missing) == plan.dropped_per_epoch


@settings(deadline=None)
@given(plans(), st.data())
def test_a_piece_lasts_until_it_is_finished(plan: BatchPlan, data: st.DataObject) -> None:
    """A rank that drops finished pieces never reads one twice, and holds what the settings allow."""
    ranks = data.draw(st.sampled_from([1, plan.settings.batch_size]))
    epoch, lanes = plan.epoch(0), plan.lanes(0, ranks)
    held: set[object] = set()
    gone: set[object] = set()
    for step in range(plan.batches_per_epoch):
        share = epoch.share(step, lanes)
        for piece, row in zip(share.pieces, share.rows, strict=True):
            assert piece.first <= row < piece.stop
        assert not gone & set(share.pieces)
        held |= {piece for piece in share.pieces if piece.epoch != ANY_EPOCH}
        held -= set(share.finished)
        gone |= set(share.finished)
        assert len(held) <= len(plan.buckets) * STREAMS * len(lanes)
    assert held == set()


@settings(deadline=None)
@given(plans())
def test_what_fits_into_the_buffer_is_read_by_the_block_in_every_epoch(plan: BatchPlan) -> None:
    pieces = [
        {piece for step in range(plan.batches_per_epoch) for piece in epoch.share(step, range(size)).pieces}
        for size, epoch in [(plan.settings.batch_size, plan.epoch(number)) for number in (0, 1)]
    ]
    fits = sum(one.nbytes for one in plan.buckets) <= plan.settings.buffer_bytes
    for found in pieces:
        assert {piece.epoch == ANY_EPOCH for piece in found} <= {fits}
        for one, other in itertools.pairwise(sorted(found)):
            assert (one.epoch, one.bucket, one.shard) < (
                other.epoch,
                other.bucket,
                other.shard,
            ) or one.stop <= other.first
    if fits and not any(plan.dropped_per_epoch.values()):
        assert pieces[0] == pieces[1]
        runs = sum(len(one.rows) for one in plan.buckets)
        assert len(pieces[0]) <= runs + 2 * FEW_READS * len(plan.buckets)  # these rows are too few for READ_BYTES


@pytest.mark.parametrize("buffer_bytes", [1, 1 << 30])
def test_a_batch_has_rows_of_everywhere(buffer_bytes: int) -> None:
    """32 shards in order of their content, say: of 32 rows, most are of shards of their own, in every batch."""
    order = OrderSettings(seed=0, batch_size=32, buffer_bytes=buffer_bytes)
    plan = BatchPlan((bucket("a", *[90] * 32),), order)
    epoch = plan.epoch(0)
    for step in range(plan.batches_per_epoch):
        shards = [piece.shard for piece in epoch.share(step, range(32)).pieces]
        assert len(set(shards)) > 12
        assert max(Counter(shards).values()) < 9


def test_buckets_share_the_buffer() -> None:
    buckets = (bucket("a", *[90] * 300), bucket("b", *[90] * 100, row_bytes=3 * ROW_BYTES))
    order = OrderSettings(seed=0, batch_size=16, buffer_bytes=512 << 20)
    total = sum(one.nbytes for one in buckets)
    held = [order.block_rows(one, total) * one.row_bytes * STREAMS * order.batch_size for one in buckets]
    assert sum(held) <= order.buffer_bytes
    assert all(part > order.buffer_bytes // 3 for part in held)


def test_no_row_is_read_twice_by_workers_that_divide_the_streams() -> None:
    plan = BatchPlan((bucket("a", *[90] * 40),), OrderSettings(seed=1, batch_size=4, buffer_bytes=64 << 20))
    epoch = plan.epoch(0)
    for workers in (1, 2, 4, 8):
        readers: dict[object, set[int]] = {}
        for step in range(plan.batches_per_epoch):
            for piece in epoch.share(step, range(4)).pieces:
                readers.setdefault(piece, set()).add(step % workers)
        assert {len(of) for of in readers.values()} == {1}


def test_reads_are_few_and_large() -> None:
    """90,000 rows of 64 KiB in 1,000 shards: blocks of 4 MiB, and at most one more piece per lane."""
    settings = OrderSettings(seed=0, batch_size=32)
    plan = BatchPlan((rows := bucket("a", *[90] * 1000),), settings)
    epoch = plan.epoch(0)
    assert settings.block_rows(rows, rows.nbytes) == 64
    pieces = {p for step in range(0, plan.batches_per_epoch) for p in epoch.share(step, range(32)).pieces}
    assert len(pieces) <= 2000 + 32 * STREAMS


def test_seeds_and_epochs_give_other_orders_and_the_same_one_again() -> None:
    def sequence(seed: int, epoch: int) -> list[tuple[int, ...]]:
        plan = BatchPlan((bucket("a", 50, 30), bucket("b", 40)), OrderSettings(seed=seed, batch_size=4))
        one = plan.epoch(epoch)
        return [one.share(step, range(4)).rows for step in range(plan.batches_per_epoch)]

    assert sequence(0, 0) == sequence(0, 0)
    assert len({str(sequence(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_the_order_is_pinned() -> None:
    """A saved count must mean the same batches in later releases: these numbers may not change."""
    assert random_order(8, "pinned", 7).tolist() == PINNED_ORDER
    plan = BatchPlan((bucket("a", 50, 30),), OrderSettings(seed=3, batch_size=4, buffer_bytes=1 << 20))
    assert [plan.epoch(2).share(step, range(4)).rows for step in (0, 7)] == PINNED_ROWS
    assert shuffled_keys(np.arange(8), "pinned", 7).argsort().tolist() == PINNED_KEYS


def test_without_shuffling_rows_come_as_stored() -> None:
    plan = BatchPlan((bucket("a", 3, 4),), OrderSettings(seed=0, batch_size=2, shuffle=False, tail="pad"))
    epoch = plan.epoch(0)
    shares = [epoch.share(step, range(2)) for step in range(plan.batches_per_epoch)]
    assert [share.rows for share in shares] == [(0, 1), (2, 100), (101, 102), (103, 103)]
    assert shares[-1].is_padding == (False, True)


def test_a_bucket_below_one_batch_is_reported() -> None:
    buckets = (bucket("a", 3, 4), bucket("b", 10))
    assert BatchPlan(buckets, OrderSettings(seed=0, batch_size=8)).too_small == {"a": 7}
    assert BatchPlan(buckets, OrderSettings(seed=0, batch_size=8)).dropped_per_epoch == {"a": 7, "b": 2}
    padded = BatchPlan(buckets, OrderSettings(seed=0, batch_size=8, tail="pad"))
    assert padded.too_small == {}
    assert padded.batches_per_epoch == 3


def test_what_makes_no_plan_is_refused() -> None:
    plan = BatchPlan((bucket("a", 30),), OrderSettings(seed=0, batch_size=6))
    with pytest.raises(ValueError, match="multiple of world_size=4"):
        plan.lanes(0, 4)
    with pytest.raises(ValueError, match="rank 2 of 2"):
        plan.lanes(2, 2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        OrderSettings(seed=0, batch_size=0)
    with pytest.raises(ValueError, match="tail: expected"):
        OrderSettings(seed=0, batch_size=1, tail="keep")  # type: ignore[arg-type]


PINNED_ORDER = [5, 0, 4, 2, 6, 3, 1, 7]
PINNED_ROWS = [(42, 13, 102, 22), (12, 100, 21, 28)]
PINNED_KEYS = [6, 3, 5, 1, 4, 0, 2, 7]
