"""DataLoader workers, ranks and resumes: the same batches, whoever reads them."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.reader import LatentBatch, LatentDataset
from pipeline.storage import Store
from tests.pipeline.reader.made_datasets import write_dataset

SETTINGS: dict[str, Any] = {"seed": 5, "sample": "sample", "caption_dropout": 0.3, "tail": "pad", "epochs": 2}


@pytest.fixture(scope="module", params=["webdataset", "parquet"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, format_name=request.param, logvar=True)
    return str(folder)


@pytest.fixture(params=[1, 1 << 30], ids=["beyond the buffer", "in the buffer"])
def settings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Pieces of lanes, or whole blocks."""
    return SETTINGS | {"buffer_bytes": request.param}


def loader(dataset: LatentDataset, workers: int, **options: Any) -> DataLoader[LatentBatch]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


def assert_same(found: list[LatentBatch], expected: list[LatentBatch]) -> None:
    assert [batch.number for batch in found] == [batch.number for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.latents_BCTHW, other.latents_BCTHW)
        for name in ("keys", "captions", "shard_ids", "bucket", "epoch"):
            assert getattr(one, name) == getattr(other, name)
        assert torch.equal(one.is_padding_B, other.is_padding_B)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_give_the_batches_of_one_process(folder: str, settings: dict[str, Any], workers: int) -> None:
    dataset = LatentDataset(folder, 4, **settings)
    assert_same(list(loader(dataset, workers)), list(dataset))


def test_a_spawned_worker_reads_too(tmp_path: Path) -> None:
    write_dataset(tmp_path, logvar=True)
    dataset = LatentDataset(str(tmp_path), 8, **SETTINGS | {"epochs": 1})
    assert_same(list(loader(dataset, 1, multiprocessing_context="spawn")), list(dataset))


def test_a_run_goes_on_with_other_ranks_and_workers(folder: str, settings: dict[str, Any]) -> None:
    """Saved by rank 0 of 1 in the middle of the second epoch, resumed by 2 ranks with other workers, and by 4."""
    unbroken = list(LatentDataset(folder, 4, **settings))
    stop = LatentDataset(folder, 4, **settings).batches_per_epoch + 3
    consumed = 0
    for batch in loader(LatentDataset(folder, 4, **settings), 2):
        consumed = batch.consumed
        if consumed == stop:
            break
    state = json.loads(json.dumps(LatentDataset(folder, 4, **settings).state(consumed)))
    assert len(json.dumps(state)) < 100
    for ranks, workers in ((2, 0), (4, 1)):
        parts = [
            list(loader(LatentDataset(folder, 4, start=state, rank=rank, world_size=ranks, **settings), workers))
            for rank in range(ranks)
        ]
        rest = unbroken[stop:]
        assert [len(part) for part in parts] == [len(rest)] * ranks
        for whole, shares in zip(rest, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat([share.latents_BCTHW for share in shares]), whole.latents_BCTHW)
            assert [caption for share in shares for caption in share.captions] == whole.captions
            assert {share.number for share in shares} == {whole.number}


def test_endless_epochs(folder: str) -> None:
    dataset = LatentDataset(folder, 16, seed=1, epochs=None, start=1000)
    batches = iter(dataset)
    found = [next(batches) for _ in range(12)]
    assert [batch.number for batch in found] == list(range(1000, 1012))
    assert {batch.epoch for batch in found} == {number // dataset.batches_per_epoch for number in range(1000, 1012)}


def test_a_state_of_another_order_is_refused(folder: str) -> None:
    state = LatentDataset(folder, 4, seed=1).state(3)
    assert LatentDataset(folder, 4, seed=1, start=state).start == 3
    for settings in ({"seed": 2}, {"seed": 1, "tail": "pad"}, {"seed": 1, "buffer_bytes": 1 << 20}):
        with pytest.raises(ValueError, match="start: expected a state of the order"):
            LatentDataset(folder, 4, start=state, **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size"):
        LatentDataset(folder, 8, seed=1, start=state)


def test_memory_is_given_back_whatever_the_workers(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that never sees the last row of a piece must not keep it: three workers, eight streams."""
    from pipeline.reader import batches as module

    most = 0
    let_go = module.BatchReader._let_go

    def watched(self: Any, planned: Any) -> None:
        nonlocal most
        let_go(self, planned)
        most = max(most, len(self._held))

    monkeypatch.setattr(module.BatchReader, "_let_go", watched)
    dataset = LatentDataset(folder, 2, seed=1, epochs=40, buffer_bytes=1)
    reader = module.BatchReader(
        dataset.catalog,
        dataset.plan,
        module.PieceReader(dataset.catalog, Store(folder)),
        dataset.reading,
        lanes=range(2),
        on_corrupt="raise",
        threads=1,
    )
    for _ in reader.batches(range(1, 40 * dataset.batches_per_epoch, 3)):
        pass
    ahead = module.AHEAD_BATCHES + module.MADE_AHEAD + 1
    assert 0 < most <= 2 * 8 * 2 + 2 * ahead  # buckets, streams, lanes; and what is asked for ahead
    assert (len(reader._held), reader._asked) == (0, {})


def test_a_dataset_can_be_pickled(folder: str) -> None:
    dataset = LatentDataset(folder, 4, seed=1)
    assert_same(list(pickle.loads(pickle.dumps(dataset))), list(dataset))


def test_batches_move_and_pin(folder: str) -> None:
    batch = next(iter(LatentDataset(folder, 4)))
    moved = batch.to("meta")
    assert moved.latents_BCTHW.device.type == "meta"
    assert moved.keys == batch.keys
