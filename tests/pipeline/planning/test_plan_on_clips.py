"""A plan from a part of real clips, held against the run over all of them."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs.v2d_shards import FAILED_TO_DOWNLOAD, DownloadedVideo, write_shard
from pipeline.checkpoints import load_source
from pipeline.decode.pool import DecodePool
from pipeline.encoder import TileEncoder
from pipeline.errors import DatasetError
from pipeline.planning.census import take_census
from pipeline.planning.compare import PLAN, compare, read_plan
from pipeline.planning.estimate import EncodePlan, EncoderShape, make_plan
from pipeline.planning.sample import take_sample
from pipeline.policies import DecodePolicy
from pipeline.run import EncodeSettings, RunLog, commit_all, finish_run, plan_run
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder
from pipeline.sources import WebDatasetSource, plan_source
from tests.whole_run import settings_for

TARS, PER_TAR = 4, 5
ONE_CORE = EncoderShape(decode_children=1, encode_threads=1, cores=2)


@pytest.fixture(scope="module")
def settings(good_videos: list[DownloadedVideo], tmp_path_factory: pytest.TempPathFactory) -> EncodeSettings:
    folder = tmp_path_factory.mktemp("planned")
    (folder / "source").mkdir()
    whole = good_videos[0].video
    assert whole is not None
    gone = DownloadedVideo(caption="gone", status=FAILED_TO_DOWNLOAD, error_message="HTTP Error 404: Not Found")
    half = DownloadedVideo(caption="half a file", video=whole[: len(whole) // 2])
    chance = random.Random(5)
    for number in range(TARS):
        videos = chance.choices([*good_videos, gone, half], k=PER_TAR)
        write_shard(folder / "source", number, videos)
    settings = settings_for(str(folder / "source"), str(folder / "out"))
    # several windows of a clip: a tar is padded to 10 KB, under which dtypes would not differ
    return settings.model_copy(update={"windows": settings.windows.model_copy(update={"max_windows": 4})})


@pytest.fixture(scope="module")
def planned(settings: EncodeSettings) -> EncodePlan:
    found = plan_source(settings.source).shards
    vae = load_source(settings.vae)
    sample = take_sample(settings, found, vae, torch.device("cpu"), threads=1, clips=4 * TARS, max_seconds=3600)
    return make_plan(found, take_census(found, settings.source), sample, ONE_CORE, encoders=(1,))


def test_the_sample_is_a_part_of_every_tar(planned: EncodePlan) -> None:
    assert (planned.sampled_groups, planned.sampled_samples) == (TARS, 4 * TARS)
    assert (planned.samples.low, planned.samples.high) == (TARS * PER_TAR, TARS * PER_TAR), "the sidecars say it"
    assert planned.rejections["upstream_failed"].value > 0
    sizes = {name: estimate.value for name, estimate in planned.storage_bytes.items()}
    assert sizes["float16 mean"] == pytest.approx(planned.totals["payload bytes"].value, rel=1e-6)
    assert sizes["float16 mean"] < sizes["float32 mean"] < sizes["float32 mean and log variance"]


def test_the_run_comes_out_as_planned(settings: EncodeSettings, planned: EncodePlan, tmp_path: Path) -> None:
    plan, log = plan_run(settings, {}), RunLog(shards_total=TARS)
    plan.dataset.store.replace(PLAN, planned.to_bytes())
    with DecodePool(DecodePolicy(), 1) as pool:
        tiles = TileEncoder(load_source(settings.vae), settings.encode, torch.device("cpu"), threads=1)
        encoder = ShardEncoder(plan.job(), tiles, pool, Scratch(tmp_path))
        list(commit_all(plan, map(encoder.run, plan.todo), log, set_aside_poison=False))
    manifest = finish_run(plan, log)
    read = read_plan(plan.dataset, plan.run_file.fingerprint)
    assert read == planned
    compared = {one.name: one for one in compare(planned, manifest, log)}
    outside = [one.record() for one in compared.values() if not one.inside and "seconds" not in one.name]
    assert outside == []
    assert set(manifest.buckets) == set(planned.buckets)
    encode = compared["encode seconds"]
    assert 0.1 < encode.actual / encode.planned.value < 10, "of the same order, on however busy a machine"


def test_a_plan_of_another_identity_is_not_compared(settings: EncodeSettings, planned: EncodePlan) -> None:
    dataset = plan_run(settings, {}).dataset
    dataset.store.replace(PLAN, planned.to_bytes())
    with pytest.raises(DatasetError, match="made for identity"):
        read_plan(dataset, "0" * 64)
    dataset.store.remove(PLAN)
    assert read_plan(dataset, planned.fingerprint) is None


def test_tars_without_sidecars_are_counted_by_their_headers(settings: EncodeSettings, tmp_path: Path) -> None:
    assert isinstance(settings.source, WebDatasetSource)
    source = Path(str(settings.source.urls))
    for tar in source.glob("*.tar"):
        (tmp_path / tar.name).symlink_to(tar)
    spec = settings.source.model_copy(update={"urls": str(tmp_path)})
    found = plan_source(spec).shards
    census = take_census(found, spec)
    assert census.samples.tolist() == [PER_TAR] * TARS
    assert census.num_counted == TARS
    many = [*found, *(dataclasses.replace(shard, id=f"{n}") for n in range(4) for shard in found)]
    inferred = take_census(many, spec)  # more than are read: the rest by their bytes
    assert inferred.num_counted < len(many)
    assert inferred.total == pytest.approx(PER_TAR * len(many), rel=0.25)
    assert 0 < inferred.total_error < 1
    assert np.isfinite(inferred.samples).all()
