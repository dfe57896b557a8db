"""Verification looks at everything, whatever it finds first, and says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.whole_run import one_encoder, settings_for


@pytest.fixture(scope="module")
def finished(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify")
    v2d_shards(folder / "source", num_shards=3, good=1, failed=1, broken=0)
    with one_encoder(folder / "scratch") as run:
        run(settings_for(str(folder / "source"), str(folder / "out")))
    return folder / "out"


@pytest.fixture
def dataset(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def problems(folder: Path) -> list[str]:
    return verify_dataset(Store(str(folder))).problems


def test_a_finished_dataset_is_good(dataset: Path) -> None:
    assert problems(dataset) == []


def test_what_is_no_dataset(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path / "nothing")
    assert "is not a dataset" in problem


def test_an_unfinished_dataset_says_so_and_is_checked_as_far_as_it_goes(dataset: Path) -> None:
    (dataset / "manifest.json").unlink()
    (dataset / "receipts" / "00002.json").unlink()
    (dataset / "shards" / "00001.tar").unlink()
    unfinished, *others = problems(dataset)
    assert "not finished" in unfinished
    assert "committed: 2" in unfinished
    assert [problem for problem in others if "shards/00001.tar does not exist" in problem]
    assert [problem for problem in others if "shards/00002.tar has no receipt" in problem]


def test_a_lost_receipt_asks_for_the_job_not_for_deletion(dataset: Path) -> None:
    (dataset / "receipts" / "00001.json").unlink()
    found = problems(dataset)
    assert "shard 00001: manifest.json lists it, but it has no receipt: start the encode job again" in found
    assert not [problem for problem in found if "delete" in problem]


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b"[" * 2000])
def test_a_damaged_receipt_is_one_problem_among_others(dataset: Path, damage: bytes) -> None:
    (dataset / "receipts" / "00000.json").write_bytes(damage)
    (dataset / "index" / "00002.parquet").write_bytes(b"PAR1")
    found = problems(dataset)
    assert [problem for problem in found if problem.startswith("shard 00000: ")]
    assert [problem for problem in found if problem.startswith("shard 00002: index/00002.parquet: sha256")]


def test_counts_that_do_not_add_up(dataset: Path) -> None:
    path = dataset / "receipts" / "00000.json"
    receipt = json.loads(path.read_bytes())
    receipt["counts"]["samples"] += 1
    path.write_text(json.dumps(receipt))
    assert [problem for problem in problems(dataset) if "samples but" in problem]


def test_an_edited_manifest(dataset: Path) -> None:
    path = dataset / "manifest.json"
    manifest = json.loads(path.read_bytes())
    manifest["counts"]["windows_stored"] += 1
    path.write_text(json.dumps(manifest))
    assert problems(dataset) == ["manifest.json: counts is not what the receipts add up to"]


def test_a_stray_object(dataset: Path) -> None:
    (dataset / "shards" / "00009.tar").write_bytes(b"x")
    (problem,) = problems(dataset)
    assert "shards/00009.tar has no receipt" in problem
