"""Datasets that are not what their documents say: refused with a name, or skipped and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DatasetError
from pipeline.reader import LatentDataset
from tests.pipeline.reader.made_datasets import latents_of, rewrite_manifest, run_of, write_dataset, write_shard

SMALL = (17, 16, 16)


def read(folder: Path, **settings: Any) -> list[Any]:
    return list(LatentDataset(str(folder), 4, tail="pad", **settings))


def test_an_unfinished_dataset_is_refused_unless_told(tmp_path: Path) -> None:
    latents = write_dataset(tmp_path, finished=False)
    with pytest.raises(DatasetError, match="unfinished: it has no manifest"):
        read(tmp_path)
    found = {key for batch in read(tmp_path, tolerate=["unfinished"]) for key in batch.keys}
    assert found == set(latents)


def test_no_dataset_at_all(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"run\.json does not exist"):
        read(tmp_path)


def test_a_shard_of_another_identity_is_refused_unless_told(tmp_path: Path) -> None:
    latents = write_dataset(tmp_path, finished=True)
    other = run_of(logvar=True)
    mixed = latents_of("00001", [SMALL] * 14 + [(33, 16, 32)] * 6, dtype="float16", logvar=True)
    receipt = write_shard(tmp_path, other, "00001", mixed)
    shards = LatentDataset(str(tmp_path), 4).catalog.manifest.shards
    changed = [
        shard.model_copy(update={"sha256": receipt.payload.sha256, "size": receipt.payload.size})
        if shard.id == "00001"
        else shard
        for shard in shards
    ]
    rewrite_manifest(tmp_path, shards=tuple(changed))
    with pytest.raises(DatasetError, match=r"index/00001\.parquet: mixed: expected identity"):
        read(tmp_path)
    assert {key for batch in read(tmp_path, tolerate=["mixed"]) for key in batch.keys} == set(latents)


def test_documents_of_a_newer_format_or_another_identity(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    rewrite_manifest(tmp_path, fingerprint="ab" * 32)
    with pytest.raises(DatasetError, match="fingerprint: expected that of its identity"):
        read(tmp_path)
    rewrite_manifest(tmp_path, format_version=2)
    with pytest.raises(DatasetError, match="format_version at most 1, got 2"):
        read(tmp_path)


def damage(path: Path, kind: str) -> None:
    data = bytearray(path.read_bytes())
    if kind == "cut":
        path.write_bytes(data[: len(data) // 3])
    elif kind == "gone":
        path.unlink()
    else:
        data[512:] = bytes(len(data) - 512)
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["cut", "gone", "zeroed"])
@pytest.mark.parametrize("format_name", ["webdataset", "parquet"])
@pytest.mark.parametrize("buffer_bytes", [1, 1 << 30])
def test_a_damaged_shard_is_named_or_skipped_and_counted(
    tmp_path: Path, format_name: str, buffer_bytes: int, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    latents = write_dataset(tmp_path, format_name=format_name)
    (shard,) = (tmp_path / "shards").glob("00002.*")
    damage(shard, kind)
    with pytest.raises((DatasetError, FileNotFoundError), match=r"00002\.") as raised:
        read(tmp_path, buffer_bytes=buffer_bytes)
    assert "shards/00002" in str(raised.value)
    batches = read(tmp_path, on_corrupt="skip", buffer_bytes=buffer_bytes)
    good = {key for key, latent in latents.items() if latent.row.shard_id != "00002"}
    seen = [
        key
        for batch in batches
        for key, padding in zip(batch.keys, batch.is_padding_B.tolist(), strict=True)
        if not padding
    ]
    assert good <= set(seen)
    assert len(seen) == len(set(seen))
    assert all(len(batch.keys) == len(batch.latents_BCTHW) == 4 for batch in batches)
    unreadable = sum(batch.num_unreadable for batch in batches)
    if kind == "gone" or format_name == "parquet":
        assert set(seen) == good
    assert len(latents) - len(seen) <= unreadable
    assert unreadable > 0
    assert caplog.text.count("shard 00002: rows") == 1


def test_a_share_without_one_good_row_is_filled_from_other_batches(tmp_path: Path) -> None:
    write_dataset(tmp_path, shards=2, small=3, long=0)
    damage(tmp_path / "shards" / "00001.tar", "gone")
    batches = list(LatentDataset(str(tmp_path), 1, on_corrupt="skip"))
    assert len(batches) == 7
    assert sum(batch.num_unreadable for batch in batches) == 4
    assert {key[:5] for batch in batches for key in batch.keys} == {"00000"}
    damage(tmp_path / "shards" / "00000.tar", "gone")
    with pytest.raises(DatasetError, match="not one row of it can be read"):
        list(LatentDataset(str(tmp_path), 1, on_corrupt="skip"))


def test_checksums_find_a_changed_number(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    path = tmp_path / "shards" / "00001.tar"
    data = bytearray(path.read_bytes())
    at = data.index(b"NUMPY") + 200
    data[at] ^= 1
    path.write_bytes(data)
    read(tmp_path)
    with pytest.raises(DatasetError, match=r"shards/00001\.tar: expected \d+ bytes with sha256"):
        read(tmp_path, checksums=True)


def test_an_index_of_another_shard(tmp_path: Path) -> None:
    write_dataset(tmp_path)
    (tmp_path / "index" / "00001.parquet").write_bytes((tmp_path / "index" / "00002.parquet").read_bytes())
    with pytest.raises(DatasetError, match=r"index/00001\.parquet: not the index of the shard 00001"):
        read(tmp_path)
    (tmp_path / "index" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(DatasetError, match=r"index/00001\.parquet"):
        read(tmp_path)
