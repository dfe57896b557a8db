"""Planning over tars: patterns, what is not there, buckets; reading a bucket through faults."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import ConfigError, SourceError
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.sources import tar as tar_source
from pipeline.storage import ObjectInfo, Store, object_info
from tests.pipeline.sources.tar_cases import (
    SMALL_TAR,
    Outcome,
    read_url,
)
from tests.s3_server import Fault, S3Server, proxy_to


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in (2, 0, 1, 10):
        (tmp_path / f"{number:05d}.tar").write_bytes(b"x" * number)
        (tmp_path / f"{number:05d}.parquet").touch()
    (tmp_path / "00007.tar").mkdir()
    return tmp_path


PATTERNS = {
    "": ["00000", "00001", "00002", "00010"],
    "/": ["00000", "00001", "00002", "00010"],
    "/*.tar": ["00000", "00001", "00002", "00010"],
    "/0000[12].*": ["00001", "00002"],
    "/{00000..00002}.tar": ["00000", "00001", "00002"],
    "/{00010,00001}.tar": ["00001", "00010"],
    "/0000{1,2}.t{a,a}r": ["00001", "00002"],
    "/00002.tar": ["00002"],
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_planning(folder: Path, pattern: str) -> None:
    shards = plan_source(WebDatasetSource(urls=f"{folder}{pattern}")).shards
    assert [shard.id for shard in shards] == PATTERNS[pattern]
    assert [(s.url, s.size) for s in shards] == [(f"{folder}/{s.id}.tar", int(s.id)) for s in shards]


def test_planning_a_list_counts_each_file_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    name = folder.name
    urls = [f"{folder}/00010.tar", str(folder), f"{folder}/*.tar", f"{name}/00001.tar", f"./{name}/../{name}"]
    shards = plan_source(WebDatasetSource(urls=tuple(urls))).shards
    assert [shard.id for shard in shards] == ["00000", "00001", "00002", "00010"]
    assert all(shard.url.startswith("/") for shard in shards), "workers have other working directories"


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("/absent", "absent does not exist"),
        ("/absent.tar", "absent.tar does not exist"),
        ("/{00000..00003}.tar", "00003.tar does not exist"),
        ("/*.mp4", "no .tar found"),
        ("/00000.parquet", "no .tar found .*1 other"),
        ("/00007.tar", "00007.tar does not exist"),
    ],
)
def test_planning_what_is_not_there(folder: Path, pattern: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        plan_source(WebDatasetSource(urls=f"{folder}{pattern}"))


def test_planning_an_unbalanced_brace(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.urls: .*\{00000"):
        plan_source(WebDatasetSource(urls=f"{folder}/{{00000..2.tar"))


def test_two_tars_of_one_stem(folder: Path) -> None:
    (folder / "more").mkdir()
    (folder / "more/00001.tar").touch()
    with pytest.raises(SourceError, match=r"'00001'.*00001\.tar and .*more/00001\.tar"):
        plan_source(WebDatasetSource(urls=(str(folder), f"{folder}/more")))


@pytest.mark.parametrize("pattern", ["", "/*.tar", "/{00000..00002}.tar"])
def test_planning_on_s3(bucket: Store, pattern: str) -> None:
    shards = plan_source(WebDatasetSource(urls=f"{bucket.url}{pattern}", options=bucket.options)).shards
    assert [shard.id for shard in shards] == ["00000", "00001", "00002"]
    assert {(shard.size, shard.etag) for shard in shards} == {(len(SMALL_TAR), hashlib.md5(SMALL_TAR).hexdigest())}
    assert shards[0].url == f"{bucket.url}/00000.tar"


def test_reading_from_s3_through_faults(bucket: Store, s3_server: S3Server, whole: Outcome) -> None:
    with proxy_to(s3_server) as proxy:
        spec = WebDatasetSource(urls=f"{bucket.url}/00000.tar", options=proxy.options)
        (shard,) = plan_source(spec).shards
        proxy.faults.extend([Fault(cut_after=700), Fault(cut_after=2000)])
        outcome = read_url(shard.url, planned=shard, options=proxy.options)
        assert outcome == whole
        assert len(proxy.requests("GET", "00000.tar")) == 3


def test_a_long_brace_pattern_is_one_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(100):
        (tmp_path / f"{number:05d}.tar").write_bytes(bytes(10240))
    pattern = f"{tmp_path}/{{00000..00099}}.tar"
    (tmp_path / "other.tar").write_bytes(bytes(10240))
    asked_for: list[str] = []

    def ask(url: str, options: dict[str, Any]) -> ObjectInfo:
        asked_for.append(url)
        return object_info(url, options)

    monkeypatch.setattr(tar_source, "object_info", ask)
    shards = plan_source(WebDatasetSource(urls=pattern)).shards
    assert [shard.id for shard in shards] == [f"{number:05d}" for number in range(100)]
    assert {shard.size for shard in shards} == {10240}
    assert asked_for == []
    (tmp_path / "00042.tar").unlink()
    with pytest.raises(SourceError, match=r"00042\.tar does not exist"):
        plan_source(WebDatasetSource(urls=pattern))
