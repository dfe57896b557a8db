"""Whole runs with everything on a real S3 server, without Ray: the same bytes as on local disk."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from cvvae import save_vae
from pipeline.checkpoints import VAESource, load_source
from pipeline.errors import PipelineError
from pipeline.sources import TableSource
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.s3_server import S3Server
from tests.whole_run import Run, dataset_bytes, one_encoder, settings_for, upload

if TYPE_CHECKING:
    from jobs.v2d_shards import DownloadedVideo


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with one_encoder(tmp_path_factory.mktemp("scratch")) as run:
        yield run


def test_a_bucket_holds_what_a_disk_would(
    s3_server: S3Server, v2d_shards: Callable[..., list[Path]], run: Run, tmp_path: Path
) -> None:
    v2d_shards(tmp_path / "source", num_shards=2, good=1, failed=1, broken=0)
    bucket = Store(f"{s3_server.url}/run", options=s3_server.options)
    upload(tmp_path / "source", bucket, "source")
    settings = settings_for(f"{bucket.url}/source", f"{bucket.url}/out", s3_server.options)
    with pytest.raises(PipelineError, match="1 of 2 shards came to no end"):
        run(settings, limit=1)
    on_s3 = run(settings)
    on_disk = run(settings_for(str(tmp_path / "source"), str(tmp_path / "out")))
    assert on_s3.to_bytes() == on_disk.to_bytes()
    out = Store(f"{bucket.url}/out", options=s3_server.options)
    for name, content in dataset_bytes(out).items():
        # a receipt names the source's object: its URL and ETag
        assert name.startswith("receipts/") or content == (tmp_path / "out" / name).read_bytes()
    assert verify_dataset(out, source=settings.source).problems == []


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_its_files_and_parquet_output_on_s3(
    s3_server: S3Server, good_videos: list[DownloadedVideo], run: Run, tmp_path: Path, suffix: str
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    with (clips / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["uri", "caption"])
        for number, video in enumerate(good_videos[:3]):
            assert video.video is not None
            (clips / f"{number}.mp4").write_bytes(video.video)
            writer.writerow([f"{number}.mp4", video.caption])
        writer.writerow(["absent.mp4", "no such object"])
    pq.write_table(pyarrow.csv.read_csv(clips / "table.csv"), clips / "table.parquet")
    bucket = Store(f"{s3_server.url}/table{suffix}", options=s3_server.options)
    upload(clips, bucket, "source")
    source = TableSource(url=f"{bucket.url}/source/table{suffix}", rows_per_shard=2, options=s3_server.options)
    settings = settings_for(source, f"{bucket.url}/out", s3_server.options, format_name="parquet")
    manifest = run(settings)
    assert (manifest.counts.clips_encoded, manifest.rejections) == (3, {"missing_file": 1})
    assert [shard.id for shard in manifest.shards] == ["table-00000", "table-00001"]
    report = verify_dataset(Store(f"{bucket.url}/out", options=s3_server.options), source=source)
    assert (report.problems, report.source_clips) == ([], 3)


def test_checkpoints_on_s3(s3_server: S3Server, tmp_path: Path) -> None:
    seeded = load_source(VAESource(spec="cvvae-sd21-tiny", options={}))
    save_vae(seeded, tmp_path / "vae")
    bucket = Store(f"{s3_server.url}/checkpoints", options=s3_server.options)
    upload(tmp_path / "vae", bucket, "vae")
    for url in (f"{bucket.url}/vae", f"{bucket.url}/vae/diffusion_pytorch_model.safetensors"):
        vae = VAESource(checkpoint=url, options=s3_server.options)
        loaded = load_source(vae, cache=tmp_path / "cache")
        for name, tensor in seeded.state_dict().items():
            assert loaded.state_dict()[name].equal(tensor)
