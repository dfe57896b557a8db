"""Batches: the same for any number of workers, resumable, without the samples that cannot be used."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from webdataset.writer import TarWriter

from pipeline.errors import ConfigError, SourceError
from pipeline.training.batches import Batch, Loader, Positions, held_out_frames, plan_shards, source_of_step, to_video
from pipeline.training.settings import DataSettings, SampleSource, TrainSettings

STEPS = 6


def load(
    data: DataSettings,
    *,
    start: int = 0,
    stop: int = STEPS,
    positions: Positions | None = None,
    rank: int = 0,
    num_workers: int = 1,
) -> list[Batch]:
    shards = {source.name: plan_shards(source) for source in data.sources}
    loader = Loader(
        data,
        shards,
        seed=7,
        start=start,
        stop=stop,
        positions=positions or {},
        rank=rank,
        num_workers=num_workers,
    )
    with loader:
        return list(loader)


def mixed(tiny_run: Callable[..., TrainSettings], picture_tars: Path, **changes: Any) -> DataSettings:
    """Clips and pictures, of other sizes and batches."""
    data = tiny_run().data
    pictures = {"name": "pictures", "media": "image", "urls": str(picture_tars), "size": [16, 24], "batch_size": 4}
    plain = data.model_dump() | {"sources": [data.sources[0].model_dump(), pictures]} | changes
    return DataSettings.model_validate(plain)


def same(first: Sequence[Batch], second: Sequence[Batch]) -> bool:
    return [(b.step, b.source, b.keys, b.numbers) for b in first] == [
        (b.step, b.source, b.keys, b.numbers) for b in second
    ] and all(np.array_equal(a.frames_NTHWC, b.frames_NTHWC) for a, b in zip(first, second, strict=True))


def test_workers_share_what_one_would_take(tiny_run: Callable[..., TrainSettings], picture_tars: Path) -> None:
    data = mixed(tiny_run, picture_tars)
    alone = load(data)
    assert {batch.source for batch in alone} == {"clips", "pictures"}
    halves = [load(data, rank=rank, num_workers=2) for rank in (0, 1)]
    for whole, first, second in zip(alone, *halves, strict=True):
        assert sorted(first.numbers + second.numbers) == list(whole.numbers)
        assert first.skipped + second.skipped == whole.skipped
        for part in (first, second):
            for number, frames, key in zip(part.numbers, part.frames_NTHWC, part.keys, strict=True):
                assert whole.keys[number] == key
                assert np.array_equal(whole.frames_NTHWC[number], frames)


def test_going_on_gives_the_same_batches(tiny_run: Callable[..., TrainSettings], picture_tars: Path) -> None:
    data = mixed(tiny_run, picture_tars)
    whole = load(data)
    positions: Positions = {}
    for batch in whole[:4]:
        positions.setdefault(batch.source, {}).update(batch.positions)
    rest = load(data, start=4, positions=positions)
    assert same(rest, whole[4:])
    assert [batch.skipped for batch in rest] == [batch.skipped for batch in whole[4:]]


def test_samples_that_cannot_be_used_are_counted(tiny_run: Callable[..., TrainSettings], picture_tars: Path) -> None:
    data = mixed(tiny_run, picture_tars)
    skipped = sum((batch.skipped for batch in load(data, stop=16)), Counter())
    keys = {key for batch in load(data, stop=16) for key in batch.keys}
    assert skipped["upstream_failed"] >= 3
    assert skipped["corrupt_frames"] + skipped["decode_failed"] >= 3
    assert "no_picture" not in keys
    assert len(keys) > 8


def test_sources_come_by_weight_and_seed(tiny_run: Callable[..., TrainSettings]) -> None:
    one = tiny_run().data.sources[0]
    sources = [one.model_copy(update={"name": f"s{k}", "weight": k}) for k in (1, 3)]
    drawn = Counter(source_of_step(sources, 0, step).name for step in range(4000))
    assert 0.71 < drawn["s3"] / 4000 < 0.79
    assert [source_of_step(sources, 1, step).name for step in range(50)] != [
        source_of_step(sources, 2, step).name for step in range(50)
    ]


def test_lanes_must_be_dealt_evenly(tiny_run: Callable[..., TrainSettings]) -> None:
    with pytest.raises(ConfigError, match=r"data\.lanes: expected a multiple of the 3 workers, got 2"):
        load(tiny_run().data, num_workers=3)


def test_a_source_of_rubbish_ends_the_run_with_its_classes(
    tiny_run: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    with TarWriter(str(tmp_path / "00000.tar")) as tar:
        tar.write({"__key__": "a", "mp4": b"no video", "txt": ""})
        tar.write({"__key__": "b", "mp4": b"none either", "txt": ""})
    rubbish = tiny_run().data.sources[0].model_copy(update={"urls": str(tmp_path)})
    with pytest.raises(SourceError, match=r"data\.sources\.clips: no sample could be used: unsupported_container"):
        load(DataSettings(sources=(rubbish,)))


def test_held_out_samples_are_fixed_and_dealt(clip_tars: Path) -> None:
    source = SampleSource(name="h", urls=str(clip_tars), frames=5, size=(32, 32), max_start=9)
    whole = held_out_frames(source, 4)
    assert [key for key, _ in whole] == [key for key, _ in held_out_frames(source, 4)]
    parts = [held_out_frames(source, 4, rank=rank, num_workers=2) for rank in (0, 1)]
    assert sorted(key for part in parts for key, _ in part) == sorted(key for key, _ in whole)


def test_pixels_become_minus_one_to_one() -> None:
    frames_NTHWC = np.array([0, 51, 255], np.uint8).reshape(1, 1, 1, 1, 3)
    video_BCTHW = to_video(frames_NTHWC)
    assert video_BCTHW.shape == (1, 3, 1, 1, 1)
    torch.testing.assert_close(video_BCTHW.flatten(), torch.tensor([-1.0, -0.6, 1.0]))
