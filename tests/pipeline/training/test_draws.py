"""The stream of samples: a function of the seed, resumable at any draw, dealt to lanes without loss."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

from pipeline.errors import SourceError
from pipeline.prefetch import close_clip
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.training.draws import Draw, LanePlan, Position, draws

SAMPLES = 15  # of the three tars: 3 clips, a failed and a broken one in each


def plan(folder: Path, *, lane: int = 0, num_lanes: int = 1, seed: int = 0, buffer: int = 4) -> LanePlan:
    source = WebDatasetSource(urls=str(folder))
    return LanePlan(
        source_name="clips",
        source=source,
        shards=plan_source(source).shards,
        lane=lane,
        num_lanes=num_lanes,
        seed=seed,
        buffer=buffer,
    )


def taken(lane: LanePlan, count: int, start: Position | None = None) -> list[Draw]:
    stream = draws(lane, start or Position())
    found = list(islice(stream, count))
    stream.close()  # type: ignore[attr-defined] - a generator
    for draw in found:
        close_clip(draw.sample)
    return found


def names(found: list[Draw]) -> list[tuple[int, str]]:
    return [(draw.epoch, draw.sample.key) for draw in found]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(clip_tars: Path) -> None:
    order = names(taken(plan(clip_tars), 2 * SAMPLES))
    first, second = [key for _, key in order[:SAMPLES]], [key for _, key in order[SAMPLES:]]
    assert len(set(first)) == SAMPLES
    assert sorted(first) == sorted(second)
    assert first != second
    assert {epoch for epoch, _ in order[:SAMPLES]} == {0}
    assert {epoch for epoch, _ in order[SAMPLES:]} == {1}


def test_the_order_is_the_seeds(clip_tars: Path) -> None:
    once = names(taken(plan(clip_tars, seed=5), SAMPLES))
    assert names(taken(plan(clip_tars, seed=5), SAMPLES)) == once
    assert names(taken(plan(clip_tars, seed=6), SAMPLES)) != once


@pytest.mark.parametrize(("num_lanes", "shares_tars"), [(1, False), (2, False), (4, True)])
def test_going_on_after_any_draw_gives_the_rest(clip_tars: Path, num_lanes: int, shares_tars: bool) -> None:
    lane = plan(clip_tars, lane=num_lanes - 1, num_lanes=num_lanes)
    assert lane.shares_tars is shares_tars
    whole = taken(lane, SAMPLES)
    for done in range(1, SAMPLES):
        rest = whole[done : done + 2]
        assert names(taken(lane, len(rest), whole[done - 1].following)) == names(rest)


@pytest.mark.parametrize("num_lanes", [2, 3, 4])
def test_lanes_share_an_epoch_without_loss(clip_tars: Path, num_lanes: int) -> None:
    seen: Counter[str] = Counter()
    for lane in range(num_lanes):
        found = taken(plan(clip_tars, lane=lane, num_lanes=num_lanes), SAMPLES)
        seen.update(key for epoch, key in names(found) if epoch == 0)
    assert len(seen) == SAMPLES
    assert set(seen.values()) == {1}


def test_tars_without_samples_are_no_endless_wait(tmp_path: Path) -> None:
    (tmp_path / "00000.tar").write_bytes(b"\0" * 10240)
    with pytest.raises(SourceError, match="no sample in its 1 tars"):
        taken(plan(tmp_path), 1)
