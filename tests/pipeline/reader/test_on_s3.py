"""LatentDataset on a real S3 server: the batches of a local disk, in few requests, through faults and the cache."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from pipeline.errors import DatasetError, StorageError
from pipeline.reader import LatentBatch, LatentDataset
from pipeline.storage import Store
from tests.pipeline.reader.made_datasets import write_dataset
from tests.s3_server import INTERNAL_ERROR, Fault, S3Server, proxy_to
from tests.whole_run import upload


@pytest.fixture(scope="module", params=["webdataset", "parquet"])
def both(
    request: pytest.FixtureRequest, s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """One dataset on disk and in a bucket."""
    folder = tmp_path_factory.mktemp("dataset")
    write_dataset(folder, format_name=request.param, logvar=True)
    bucket = Store(f"{s3_server.url}/{request.param}", options=s3_server.options)
    for name in ("shards", "index"):
        upload(folder / name, bucket, name)
    assert bucket.create("manifest.json", folder / "manifest.json")
    return folder, bucket.url


def read(url: str, options: dict[str, Any] | None = None, workers: int = 0, **settings: Any) -> list[LatentBatch]:
    dataset = LatentDataset(url, 4, tail="pad", sample="sample", options=options, **settings)
    return list(DataLoader(dataset, batch_size=None, num_workers=workers))


def assert_same(found: list[LatentBatch], expected: list[LatentBatch]) -> None:
    assert [batch.keys for batch in found] == [batch.keys for batch in expected]
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.latents_BCTHW, other.latents_BCTHW)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("buffer_bytes", [1, 1 << 30])
def test_a_bucket_gives_what_a_disk_gives(
    both: tuple[Path, str], s3_server: S3Server, workers: int, buffer_bytes: int
) -> None:
    folder, url = both
    found = read(url, s3_server.options, workers, buffer_bytes=buffer_bytes, epochs=2)
    assert_same(found, read(str(folder), buffer_bytes=buffer_bytes, epochs=2))


def test_forked_workers_leave_the_connections_of_their_parent_alone(
    both: tuple[Path, str], s3_server: S3Server
) -> None:
    _, url = both
    read(url, s3_server.options, workers=2)
    started = time.monotonic()
    LatentDataset(url, 4, options=s3_server.options)
    assert time.monotonic() - started < 10  # it took 15 s: a reply nobody was told of


def test_opening_reads_the_manifest_and_lists_nothing(both: tuple[Path, str], s3_server: S3Server) -> None:
    _, url = both
    with proxy_to(s3_server) as proxy:
        LatentDataset(url, 4, options=proxy.options)
        assert [head.split()[1].split("?")[0].rsplit("/", 1)[-1] for head in proxy.heads] == ["manifest.json"]


def test_faults_are_tried_again(both: tuple[Path, str], s3_server: S3Server) -> None:
    folder, url = both
    with proxy_to(s3_server) as proxy:
        proxy.faults.extend([INTERNAL_ERROR, Fault(), Fault(cut_after=100), Fault(), INTERNAL_ERROR])
        assert_same(read(url, proxy.options), read(str(folder)))
        assert not proxy.faults


def test_the_cache_spares_all_requests_but_the_manifest(
    both: tuple[Path, str], s3_server: S3Server, tmp_path: Path
) -> None:
    folder, url = both
    expected = read(str(folder))
    with proxy_to(s3_server) as proxy:
        for workers in (2, 0):
            proxy.heads.clear()
            found = read(url, proxy.options, workers, cache=tmp_path / "cache", cache_bytes=256 << 20)
            assert_same(found, expected)
        gets = [head.split()[1].split("?")[0].rsplit("/", 1)[-1] for head in proxy.heads if head.startswith("GET")]
        assert gets == ["manifest.json"]


def test_what_is_not_there_is_named(both: tuple[Path, str], s3_server: S3Server) -> None:
    _, url = both
    with pytest.raises(DatasetError, match=r"none/run\.json does not exist"):
        read(f"{url}/none", s3_server.options)
    with pytest.raises(StorageError, match="cannot open nowhere://x"):
        read("nowhere://x")
    with pytest.raises(ValueError, match="cache_bytes: expected at least"):
        read(url, s3_server.options, cache="/tmp/unused", cache_bytes=1)


def test_a_dataset_that_fits_into_the_buffer_is_fetched_once(both: tuple[Path, str], s3_server: S3Server) -> None:
    """All rows of a bucket and shard in one request, whatever the lanes, and nothing more in later epochs."""
    folder, url = both
    with proxy_to(s3_server) as proxy:
        found = read(url, proxy.options, epochs=3)
        gets = [head.split()[1].split("?")[0] for head in proxy.heads if "/shards/" in head]
    assert_same(found, read(str(folder), epochs=3))
    manifest = LatentDataset(str(folder), 4).catalog.manifest
    runs = sum(len(shard.rows) for shard in manifest.shards)
    columns = 1 if manifest.format == "webdataset" else 2
    small = 5 * len(manifest.shards) if manifest.format == "parquet" else 0  # the footer, page headers
    assert columns * runs <= len(gets) <= columns * runs + small
