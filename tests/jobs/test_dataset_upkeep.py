"""Damage to a real dataset and what mends it; rejections tried again; strays; two datasets against each other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import typer

from jobs.compare_datasets import diff
from jobs.dataset_upkeep import recorded_config, run_gc, run_repair, run_retry
from pipeline.checkpoints import VAESource
from pipeline.compare import compare_datasets
from pipeline.dataset import DatasetFolder
from pipeline.errors import ConfigError, DatasetError, IdentityMismatch, SourceChanged, SourceError
from pipeline.policies import DecodePolicy
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.whole_run import Run, dataset_bytes, one_encoder, settings_for

TOO_LARGE_FOR_SOME = 150_000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with one_encoder(tmp_path_factory.mktemp("upkeep-scratch")) as encode:
        yield encode


@pytest.fixture(scope="module")
def finished(v2d_shards: Callable[..., list[Path]], run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of two clips, of which those above a size are rejected too_large."""
    folder = tmp_path_factory.mktemp("upkeep")
    v2d_shards(folder / "source", num_shards=4, good=2, failed=1, broken=0)
    settings = settings_for(str(folder / "source"), str(folder / "out"))
    run(settings.model_copy(update={"decode": DecodePolicy(max_clip_bytes=TOO_LARGE_FOR_SOME)}))
    return folder / "out"


@pytest.fixture
def dataset(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


def everything(folder: Path) -> dict[str, bytes]:
    return dataset_bytes(Store(str(folder)))


def harm(folder: Path) -> None:
    """A flipped byte in a payload, an index that is gone, a receipt that is none."""
    payload = folder / "shards" / "00000.tar"
    content = bytearray(payload.read_bytes())
    content[-4000] ^= 1
    payload.write_bytes(content)
    (folder / "index" / "00001.parquet").unlink()
    (folder / "receipts" / "00002.json").write_bytes(b"{}")


def test_repair_gives_the_bytes_of_an_unharmed_run(dataset: Path, finished: Path, run: Run) -> None:
    harm(dataset)
    untouched = (dataset / "shards" / "00003.tar").stat()
    assert run_repair(str(dataset), encode=run).good
    assert everything(dataset) == everything(finished)
    assert (dataset / "shards" / "00003.tar").stat().st_ino == untouched.st_ino, "what was whole is left alone"
    (record,) = (json.loads(path.read_bytes()) for path in (dataset / "upkeep").iterdir())
    assert record["shards"] == ["00000", "00001", "00002"]
    assert record["numerics_changed"] == []
    assert verify_dataset(Store(str(dataset))).good, "a record is no stray"


def test_a_repair_that_was_killed_is_ended_by_another(dataset: Path, finished: Path, run: Run) -> None:
    harm(dataset)

    def killed(settings: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_repair(str(dataset), encode=killed)  # type: ignore[arg-type]
    assert not (dataset / "manifest.json").exists(), "readers refuse what is half repaired"
    run(recorded_config(str(dataset)))
    assert everything(dataset) == everything(finished)


def test_repair_of_a_shard_that_lost_its_receipt_and_is_damaged(dataset: Path, finished: Path, run: Run) -> None:
    """The payload is there, is no whole one, and no receipt speaks of it."""
    (dataset / "receipts" / "00000.json").unlink()
    (dataset / "shards" / "00000.tar").write_bytes(b"half")
    (dataset / "manifest.json").unlink()
    assert run_repair(str(dataset), encode=run).good
    assert everything(dataset) == everything(finished)


def test_nothing_is_deleted_that_cannot_be_made_again(dataset: Path, tmp_path: Path, run: Run) -> None:
    harm(dataset)
    before = everything(dataset)
    source = Path(shutil.copytree(_source_of(dataset), tmp_path / "in"))
    (source / "00000.tar").write_bytes((source / "00001.tar").read_bytes())
    where = f"source.urls={source}"
    with pytest.raises(SourceChanged):
        run_repair(str(dataset), [where], encode=run)
    (source / "00000.tar").unlink()
    with pytest.raises(SourceError, match="no shard 00000"):
        run_repair(str(dataset), [where], encode=run)
    with pytest.raises(IdentityMismatch, match="weights_sha256"):
        run_repair(str(dataset), ["vae.seed=1"], encode=run)
    assert everything(dataset) == before


def _source_of(dataset: Path) -> Path:
    return Path(json.loads((dataset / "run.json").read_bytes())["source"]["urls"])


def test_retry_encodes_what_was_rejected_and_leaves_the_rest(dataset: Path, finished: Path, run: Run) -> None:
    rejected = json.loads((finished / "manifest.json").read_bytes())["rejections"]["too_large"]
    assert 0 < rejected < 8
    record = run_retry(str(dataset), ["too_large"], ["decode.max_clip_bytes=100000000"], encode=run)
    assert set(record["outcome"].values()) == {"encoded"}
    assert len(record["outcome"]) == record["windows_gained"] == rejected
    assert record["windows_lost"] == []
    assert record["windows_kept"] == record["windows_kept_and_equal"], "other rows unchanged"
    assert verify_dataset(Store(str(dataset))).good
    (written,) = (json.loads(path.read_bytes()) for path in (dataset / "upkeep").iterdir())
    assert written["outcome"] == record["outcome"]
    found = compare_datasets(DatasetFolder(Store(str(finished))), DatasetFolder(Store(str(dataset))))
    assert (found.only[0].number, found.only[1].number) == (0, rejected)
    assert found.rejections[0].number == rejected
    assert found.numbers.largest == 0


def test_retry_of_what_fails_again_changes_nothing(dataset: Path, finished: Path, run: Run) -> None:
    record = run_retry(str(dataset), ["upstream_failed"], encode=run)
    assert set(record["outcome"].values()) == {"upstream_failed"}
    assert everything(dataset) == everything(finished)
    assert run_retry(str(dataset), ["timeout"], encode=run) == {}
    with pytest.raises(ConfigError, match="too_large"):
        run_retry(str(dataset), ["tiemout"], encode=run)


def test_what_a_retry_gained_is_not_lost_to_a_repair(dataset: Path, run: Run) -> None:
    run_retry(str(dataset), ["too_large"], ["decode.max_clip_bytes=100000000"], encode=run)
    whole = everything(dataset)
    harm(dataset)
    assert run_repair(str(dataset), encode=run).good
    assert everything(dataset) == whole


def test_a_repair_says_which_shards_have_fewer_windows(
    dataset: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    harm(dataset)
    run_repair(str(dataset), ["decode.max_clip_bytes=1000"], encode=run)
    said = capsys.readouterr().out
    (record,) = (json.loads(path.read_bytes()) for path in (dataset / "upkeep").iterdir())
    assert record["windows_lost"]
    assert all(line.endswith("0 now") and line in said for line in record["windows_lost"])


def test_gc_lists_and_removes_what_no_receipt_names(dataset: Path, finished: Path) -> None:
    strays = ["shards/00009.tar", "index/00009.parquet", "shards/00000.parquet", ".staging/half"]
    for name in strays:
        (dataset / name).parent.mkdir(exist_ok=True)
        (dataset / name).write_bytes(b"left")
    assert sorted(run_gc(str(dataset), delete=False)) == sorted(strays)
    assert all((dataset / name).exists() for name in strays)
    manifest = (dataset / "manifest.json").read_bytes()
    (dataset / "manifest.json").unlink()
    with pytest.raises(DatasetError, match="unfinished"):
        run_gc(str(dataset), delete=True)
    (dataset / "manifest.json").write_bytes(manifest)
    run_gc(str(dataset), delete=True)
    assert everything(dataset) == everything(finished)
    assert not (dataset / ".staging" / "half").exists()


def test_diff_of_equal_and_of_different_datasets(
    dataset: Path, finished: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(str(_source_of(dataset)), str(tmp_path / "other"))
    run(settings.model_copy(update={"vae": VAESource(spec="cvvae-sd21-tiny", seed=1, options={})}))
    with pytest.raises(SystemExit) as same:
        _diff(finished, dataset)
    assert same.value.code == 0
    assert "4 shards with equal bytes" in capsys.readouterr().out
    with pytest.raises(SystemExit) as other:
        _diff(finished, tmp_path / "other")
    said = " ".join(capsys.readouterr().out.split())
    assert other.value.code == 1
    assert "identity: weights_sha256: A has" in said
    assert "windows only in B" in said
    assert "0 equal, largest difference" in said
    with pytest.raises(SystemExit) as missing:
        _diff(finished, tmp_path / "nothing")
    assert missing.value.code == 2


def test_diff_matches_windows_that_lie_in_other_shards(finished: Path, run: Run, tmp_path: Path) -> None:
    """The same tars under other names: other shards, the same windows."""
    (tmp_path / "source").mkdir()
    for path in _source_of(finished).glob("*.tar"):
        shutil.copy(path, tmp_path / "source" / f"x{path.name}")
    settings = settings_for(str(tmp_path / "source"), str(tmp_path / "out"))
    run(settings.model_copy(update={"decode": DecodePolicy(max_clip_bytes=TOO_LARGE_FOR_SOME)}))
    found = compare_datasets(DatasetFolder(Store(str(finished))), DatasetFolder(Store(str(tmp_path / "out"))))
    assert found.identity == []
    assert [one.number for one in found.only] == [0, 0]
    assert found.numbers.windows == found.numbers.equal > 0
    assert found.other_rows.number == 0


def _diff(a: Path, b: Path) -> None:
    try:
        diff(str(a), str(b), 0.0)
    except typer.Exit as done:
        raise SystemExit(done.exit_code) from done
