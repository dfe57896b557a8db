"""The whole job on real clips with real Ray: both formats, several buckets, good and bad samples, stop and resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.config import EncodeConfig
from jobs.dataset_report.facts import gather
from jobs.dataset_report.page import page_body
from jobs.encode_webvid import run_encode
from jobs.plan_encode import run_plan
from pipeline.dataset import DatasetFolder
from pipeline.documents import Manifest
from pipeline.errors import IdentityMismatch, SourceChanged
from pipeline.formats import FORMATS, read_index
from pipeline.planning.compare import PLAN
from pipeline.policies import FormatName
from pipeline.sources import WebDatasetSource
from pipeline.status import StatusReader
from pipeline.storage import Store
from pipeline.verify import verify_dataset

pytestmark = pytest.mark.usefixtures("ray_cluster")

BUCKETS = ((64, 64), (48, 96))
GOOD, FAILED, BROKEN, SHARDS = 4, 1, 1, 3


@pytest.fixture(scope="module")
def tars(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("source")
    return v2d_shards(folder, num_shards=SHARDS, good=GOOD, failed=FAILED, broken=BROKEN)


def config_for(tars: list[Path], output: Path, format_name: FormatName = "webdataset") -> EncodeConfig:
    return EncodeConfig.model_validate(
        {
            "source": {"kind": "webdataset", "urls": str(tars[0].parent)},
            "output": {"url": str(output), "format": format_name},
            "vae": {"spec": "cvvae-sd21-tiny", "seed": 3},
            "windows": {"frames": 17, "tail": "trim", "min_tail_frames": 5},
            "resize": {"buckets": BUCKETS},
            "encode": {"logvar": format_name == "parquet", "batch_pixels": 2 * 17 * 64 * 64, "threads": 1},
            "cluster": {"decode_children": 1, "num_actors": 2},
        }
    )


@pytest.fixture(scope="module")
def encoded(tars: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    """An undisturbed run, planned before from all of its samples."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    config = config_for(tars, output)
    planned = run_plan(config, clips=8 * SHARDS, seconds=3600)  # groups of four: a tar has two
    Store(str(output)).replace(PLAN, planned.to_bytes())
    return output, run_encode(config)


def dataset_bytes(output: Path) -> dict[str, bytes]:
    """Everything that must be equal between two runs over the same input."""
    files = [path for path in sorted(output.rglob("*")) if path.is_file()]
    names = {str(path.relative_to(output)): path for path in files}
    return {name: path.read_bytes() for name, path in names.items() if not name.startswith(("runs/", "run.json"))}


def test_every_sample_is_accounted_for(encoded: tuple[Path, Manifest]) -> None:
    output, manifest = encoded
    counts = manifest.counts
    assert counts.samples == SHARDS * (GOOD + FAILED + BROKEN)
    assert counts.clips_encoded == SHARDS * GOOD
    assert manifest.rejections["upstream_failed"] == SHARDS * FAILED
    assert sum(manifest.rejections.values()) == SHARDS * (FAILED + BROKEN)
    assert counts.windows_stored == sum(manifest.buckets.values()) > counts.clips_encoded
    assert len({name.split("x", 1)[0] for name in manifest.buckets}) > 1, "trimmed tails make buckets of their own"
    assert len(list((output / "receipts").iterdir())) == SHARDS
    run_report = json.loads(next((output / "runs").iterdir()).read_bytes())
    assert set(run_report["shard_seconds"]) == {"00000", "00001", "00002"}


def test_the_run_comes_out_as_planned(encoded: tuple[Path, Manifest]) -> None:
    """What the run's report says of it, and the page. Times are of the same order: who knows what else runs here."""
    output, manifest = encoded
    report = json.loads(min((output / "runs").iterdir()).read_bytes())
    compared = {one["name"]: one for one in report["plan_against_actual"]}
    assert {"samples", "clips", "windows", "frames", "payload bytes", "encode seconds"} <= compared.keys()
    assert [one for name, one in compared.items() if "seconds" not in name and not one["inside"]] == []
    assert compared["windows"]["actual"] == manifest.counts.windows_stored
    assert 0.1 < compared["encode seconds"]["actual"] / compared["encode seconds"]["planned"]["value"] < 10
    page = "".join(page_body(gather(DatasetFolder(Store(str(output)))), []))
    assert "Plan against actual" in page


def test_status_agrees_with_the_manifest(encoded: tuple[Path, Manifest]) -> None:
    output, manifest = encoded
    look = StatusReader(Store(str(output))).read()
    assert (look.finished, look.done, look.total, look.left) == (True, SHARDS, SHARDS, 0)
    assert (look.counts, look.rejections) == (manifest.counts, manifest.rejections)
    assert look.run is not None
    assert look.run.outcome == "finished"
    assert len(look.run.slowest_shards) == SHARDS


def test_verify_is_green_with_the_source(encoded: tuple[Path, Manifest], tars: list[Path]) -> None:
    output, manifest = encoded
    report = verify_dataset(Store(str(output)), source=WebDatasetSource(urls=str(tars[0].parent)))
    assert report.problems == []
    assert report.windows == manifest.counts.windows_stored
    assert report.source_clips == SHARDS * (GOOD + BROKEN)


def test_latents_carry_their_own_clip(encoded: tuple[Path, Manifest]) -> None:
    output, _ = encoded
    for shard in sorted((output / "shards").iterdir()):
        with shard.open("rb") as file:
            latents = list(FORMATS["webdataset"].read(file))
        assert [latent.row.sort_key for latent in latents] == sorted(latent.row.sort_key for latent in latents)
        for latent in latents:
            row = latent.row
            assert row.metadata["key"] == row.clip_key == row.key[:-6]
            assert row.metadata["caption"] == row.caption != ""
            assert list(row.frame_times) == sorted(row.frame_times)
            assert row.latent_shape == (4, 1 + (row.num_frames - 1) // 4, row.height // 8, row.width // 8)


def test_a_second_run_has_nothing_to_do(encoded: tuple[Path, Manifest], tars: list[Path]) -> None:
    output, manifest = encoded
    before = dataset_bytes(output)
    assert run_encode(config_for(tars, output)) == manifest
    assert dataset_bytes(output) == before


def test_parquet_with_logvar(tars: list[Path], tmp_path: Path, encoded: tuple[Path, Manifest]) -> None:
    output = tmp_path / "out"
    manifest = run_encode(config_for(tars, output, "parquet"))
    assert manifest.latent_mean == encoded[1].latent_mean, "the format does not change the numbers"
    assert verify_dataset(Store(str(output))).problems == []
    rows = read_index(output / "index" / "00000.parquet").rows
    assert all(row.row.has_logvar for row in rows)
    assert {shard.suffix for shard in (output / "shards").iterdir()} == {".parquet"}


def test_another_identity_is_refused_and_named(encoded: tuple[Path, Manifest], tars: list[Path]) -> None:
    other = config_for(tars, encoded[0]).model_copy(deep=True)
    changed = other.model_dump(mode="json")
    changed["windows"]["frames"] = 9
    changed["vae"]["seed"] = 4
    before = dataset_bytes(encoded[0])
    with pytest.raises(IdentityMismatch, match=r"weights_sha256(.|\n)*windows\.frames: the directory has 17"):
        run_encode(EncodeConfig.model_validate(changed))
    assert dataset_bytes(encoded[0]) == before


def test_a_changed_source_is_named(
    tars: list[Path], tmp_path: Path, v2d_shards: Callable[..., list[Path]], encoded: tuple[Path, Manifest]
) -> None:
    import shutil

    output, source = tmp_path / "out", tmp_path / "source"
    shutil.copytree(encoded[0], output)
    shutil.copytree(tars[0].parent, source)
    with (source / "00001.tar").open("ab") as file:
        file.write(bytes(10240))
    changed = config_for([source / "00000.tar"], output)
    with pytest.raises(SourceChanged, match=r"00001\.tar: its size was"):
        run_encode(changed)


def test_damage_is_found(encoded: tuple[Path, Manifest], tmp_path: Path) -> None:
    """Whatever byte of a payload is changed, a receipt is lost or a count is edited: verify says so."""
    import shutil

    output = tmp_path / "out"
    shutil.copytree(encoded[0], output)
    payload = output / "shards" / "00001.tar"
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    assert any("00001" in problem and "sha256" in problem for problem in verify_dataset(Store(str(output))).problems)
    payload.unlink()
    assert any("does not exist" in problem for problem in verify_dataset(Store(str(output))).problems)
    (output / "receipts" / "00001.json").unlink()
    assert any("manifest.json" in problem for problem in verify_dataset(Store(str(output))).problems)


def test_identity_in_run_json_is_the_fingerprint(encoded: tuple[Path, Manifest]) -> None:
    run = DatasetFolder(Store(str(encoded[0]))).run_file()
    assert run.identity.fingerprint == run.fingerprint == encoded[1].fingerprint
