"""Checkpoints: whole or not there, the newest good one counts, the rest go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pipeline.errors import DatasetError
from pipeline.storage import Store
from pipeline.training.train_state import (
    TrainState,
    load_latest,
    load_state,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_state,
    saved_steps,
)
from tests.s3_server import S3Server


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "run"))
    server: S3Server = request.getfixturevalue("s3_server")
    return Store(f"{server.url}/{tmp_path.name}", options=server.options)


def state(step: int) -> TrainState:
    return TrainState(step=step, tensors={"model.w": torch.full((3,), float(step))}, document={"note": step})


def test_round_trip_and_pruning(store: Store) -> None:
    assert load_latest(store) is None
    for step in (2, 4, 6, 8):
        save_state(store, state(step))
        prune(store, keep_last=2, best=2)
    assert saved_steps(store) == [2, 6, 8]
    assert len(list(store.names("checkpoints", ".safetensors"))) == 3
    latest = load_latest(store)
    assert latest is not None
    assert latest.step == latest.document["note"] == 8
    torch.testing.assert_close(latest.tensors["model.w"], torch.full((3,), 8.0))
    save_state(store, TrainState(step=8, tensors={"model.w": torch.zeros(3)}, document={}))  # a second attempt
    prune(store, keep_last=2, best=2)
    assert load_state(store, 8).tensors["model.w"].sum() == 0
    assert len(list(store.names("checkpoints", ".safetensors"))) == 3


def test_a_damaged_or_half_written_one_is_passed_over(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    save_state(store, state(2))
    save_state(store, state(4))
    (tmp_path / "checkpoints" / "00000006-00000000.safetensors").write_bytes(b"cut off")  # no document: never there
    (newest,) = (tmp_path / "checkpoints").glob("00000004-*.safetensors")
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    latest = load_latest(store)
    assert latest is not None
    assert latest.step == 2
    (oldest,) = (tmp_path / "checkpoints").glob("00000002-*.safetensors")
    oldest.unlink()
    with pytest.raises(DatasetError, match="none of its 2 checkpoints can be read"):
        load_latest(store)


def test_an_optimizer_goes_on_where_it_was() -> None:
    def made() -> tuple[torch.nn.Conv3d, torch.optim.AdamW]:
        torch.manual_seed(0)
        conv = torch.nn.Conv3d(2, 3, 3)
        conv.weight.data = conv.weight.data.contiguous(memory_format=torch.channels_last_3d)
        return conv, torch.optim.AdamW(conv.parameters(), lr=0.1)

    def step(conv: torch.nn.Conv3d, optimizer: torch.optim.AdamW) -> None:
        optimizer.zero_grad()
        conv(torch.ones(1, 2, 3, 3, 3)).square().sum().backward()
        optimizer.step()

    conv, optimizer = made()
    step(conv, optimizer)
    kept = {name: value.clone().contiguous() for name, value in optimizer_tensors(optimizer, "o").items()}
    assert set(kept) == {f"o.{number}.{field}" for number in (0, 1) for field in ("step", "exp_avg", "exp_avg_sq")}
    other, fresh = made()
    other.load_state_dict(conv.state_dict())
    restore_optimizer(fresh, kept, "o")
    step(conv, optimizer)
    step(other, fresh)
    assert torch.equal(conv.weight, other.weight)
