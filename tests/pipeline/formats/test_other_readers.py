"""Shards through the readers that people have: webdataset, Hugging Face datasets, pyarrow, Ray Data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.dataset
import pytest
import safetensors.torch
import torch
import webdataset

from pipeline.records import Latent
from tests.pipeline.formats.made_latents import make_latents, write_dataset

Tensorize = Callable[[Any], torch.Tensor]
DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets caches under the home directory by default."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")


def from_safetensors(data: bytes) -> torch.Tensor:
    (tensor,) = safetensors.torch.load(data).values()
    return tensor


def from_columns(row: dict[str, Any], name: str) -> torch.Tensor:
    numbers = torch.frombuffer(bytearray(row[f"vae_{name}_bytes"]), dtype=getattr(torch, row[f"vae_{name}_dtype"]))
    return numbers.reshape(list(row[f"vae_{name}_shape"]))


def assert_samples(samples: Iterable[dict[str, Any]], latents: list[Latent], tensorize: Tensorize) -> None:
    """Samples of a tar reader, whatever it makes of an npy member, are these latents in this order."""
    samples = list(samples)
    suffix = "safetensors" if latents[0].row.latent_dtype == "bfloat16" else "npy"
    assert [sample["__key__"] for sample in samples] == [latent.row.key for latent in latents]
    for sample, latent in zip(samples, latents, strict=True):
        assert sample["txt"] == latent.row.caption
        assert sample["json"]["id"] == latent.row.key
        assert list(sample["json"]["crop"]) == list(latent.row.crop)
        assert latent.logvar_CTHW is not None
        for name, expected in (("latent", latent.mean_CTHW), ("logvar", latent.logvar_CTHW)):
            value = sample[f"{name}.{suffix}"]
            found = from_safetensors(value) if suffix == "safetensors" else tensorize(value)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected)


def assert_rows(rows: Iterable[dict[str, Any]], latents: list[Latent]) -> None:
    rows = list(rows)
    assert [row["id"] for row in rows] == [latent.row.key for latent in latents]
    for row, latent in zip(rows, latents, strict=True):
        assert row["caption"] == latent.row.caption
        assert list(row["frame_times"]) == list(latent.row.frame_times)
        assert latent.logvar_CTHW is not None
        assert torch.equal(from_columns(row, "latent"), latent.mean_CTHW)
        assert torch.equal(from_columns(row, "logvar"), latent.logvar_CTHW)


@pytest.mark.parametrize("dtype", DTYPES)
def test_webdataset(tmp_path: Path, dtype: str) -> None:
    latents = make_latents(8, dtype=dtype, logvar=True)
    shard, _ = write_dataset(tmp_path / "out", "webdataset", latents)
    reader = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
    assert_samples(reader, latents, torch.from_numpy)


def test_webdataset_goes_on_after_an_empty_shard(tmp_path: Path) -> None:
    latents = make_latents(3, logvar=True)
    empty, _ = write_dataset(tmp_path / "empty", "webdataset", [])
    shard, _ = write_dataset(tmp_path / "out", "webdataset", latents)
    reader = webdataset.WebDataset([str(empty), str(shard)], shardshuffle=False).decode()
    assert_samples(reader, latents, torch.from_numpy)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_hugging_face_webdataset(tmp_path: Path, dtype: str, streaming: bool) -> None:
    latents = make_latents(8, dtype=dtype, logvar=True)
    shard, _ = write_dataset(tmp_path / "out", "webdataset", latents)
    empty, _ = write_dataset(tmp_path / "empty", "webdataset", [])
    reader = datasets.load_dataset(
        "webdataset",
        data_files=[str(shard), str(empty)],
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    # datasets keeps arrays as nested lists of Arrow values
    assert_samples(reader, latents, lambda value: torch.from_numpy(np.asarray(value, np.float16)))


@pytest.mark.parametrize("streaming", [False, True])
def test_hugging_face_parquet(tmp_path: Path, streaming: bool) -> None:
    latents = make_latents(8, dtype="bfloat16", logvar=True)
    shard, _ = write_dataset(tmp_path / "out", "parquet", latents)
    empty, _ = write_dataset(tmp_path / "empty", "parquet", [])
    reader = datasets.load_dataset(
        "parquet",
        data_files=[str(empty), str(shard)],
        split="train",
        streaming=streaming,
        cache_dir=str(tmp_path / "cache"),
    )
    assert_rows(reader, latents)


def test_pyarrow_dataset_reads_one_bucket(tmp_path: Path) -> None:
    latents = make_latents(8, dtype="bfloat16", logvar=True)
    write_dataset(tmp_path / "out", "parquet", latents)
    bucket = latents[-1].row.bucket
    table = pyarrow.dataset.dataset(tmp_path / "out" / "shards").to_table(
        filter=pyarrow.dataset.field("bucket") == bucket
    )
    assert_rows(table.to_pylist(), [latent for latent in latents if latent.row.bucket == bucket])


@pytest.mark.usefixtures("ray_cluster")
def test_ray_data(tmp_path: Path) -> None:
    import ray.data

    half, brain = make_latents(8, logvar=True), make_latents(8, dtype="bfloat16", logvar=True)
    shard, _ = write_dataset(tmp_path / "half", "webdataset", half)
    assert_samples(ray.data.read_webdataset(str(shard)).iter_rows(), half, lambda value: torch.tensor(value))
    shard, _ = write_dataset(tmp_path / "parquet", "parquet", brain)
    assert_rows(ray.data.read_parquet(str(shard)).iter_rows(), brain)
