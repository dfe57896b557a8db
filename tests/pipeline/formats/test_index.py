"""The index beside a shard."""

from __future__ import annotations

import hashlib
import io
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipeline.errors import DatasetError
from pipeline.formats import (
    FORMATS,
    INDEX_SCHEMA,
    PayloadPlace,
    iter_index,
    read_index,
    read_index_info,
    read_payload,
    write_index,
)
from tests.pipeline.formats.made_latents import HEADER, assert_same, make_latent, make_latents, write_dataset


@pytest.fixture(params=sorted(FORMATS))
def format_name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_round_trip(tmp_path: Path, format_name: str) -> None:
    latents = make_latents(8, logvar=True)
    shard, index = write_dataset(tmp_path / "out", format_name, latents)
    found = read_index(index)
    assert [row.row for row in found.rows] == [latent.row for latent in latents]
    assert [row.row_number for row in found.rows] == list(range(8))
    assert found.header == HEADER
    assert found.shard_size == shard.stat().st_size
    assert found.shard_sha256 == hashlib.sha256(shard.read_bytes()).hexdigest()
    with index.open("rb") as file:
        assert read_index(file) == found
        assert list(iter_index(file, batch_rows=3)) == found.rows
        assert read_index_info(file).num_rows == 8
    with shard.open("rb") as file:
        assert_same(list(FORMATS[format_name].fetch(file, found.rows[::-1])), latents[::-1])  # type: ignore[index]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_offsets_lead_to_the_numbers(tmp_path: Path, dtype: str) -> None:
    latents = make_latents(8, dtype=dtype, logvar=True)
    shard, index = write_dataset(tmp_path / "out", "webdataset", latents)
    data = shard.read_bytes()
    for latent, row in zip(latents, read_index(index).rows, strict=True):
        assert row.latent_offset is not None
        assert row.latent_length is not None
        assert row.logvar_offset is not None
        assert row.logvar_length is not None
        assert latent.logvar_CTHW is not None
        mean = read_payload(data[row.latent_offset : row.latent_offset + row.latent_length])
        logvar = read_payload(data[row.logvar_offset : row.logvar_offset + row.logvar_length])
        assert mean.equal(latent.mean_CTHW)
        assert logvar.equal(latent.logvar_CTHW)


def test_bytes_depend_on_content_alone(tmp_path: Path, format_name: str) -> None:
    first = write_dataset(tmp_path / "one", format_name, make_latents(8))[1]
    second = write_dataset(tmp_path / "two", format_name, make_latents(8))[1]
    assert first.read_bytes() == second.read_bytes()


def test_without_windows(tmp_path: Path, format_name: str) -> None:
    _, index = write_dataset(tmp_path / "out", format_name, [])
    assert read_index(index).rows == list(iter_index(index)) == []
    assert pq.read_schema(index).remove_metadata() == INDEX_SCHEMA


def test_many_rows_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.formats.index.ROW_GROUP_ROWS", 7)
    latents = [make_latent(f"k{number:03d}_00000") for number in range(50)]
    _, index = write_dataset(tmp_path / "out", "webdataset", latents)
    assert pq.read_metadata(index).num_row_groups == 8
    assert [row.row.key for row in iter_index(index, batch_rows=4)] == [latent.row.key for latent in latents]


def test_a_place_for_every_row(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a place for each of 1 rows, got 2"):
        write_index(
            tmp_path / "index",
            [make_latent().row],
            [PayloadPlace(), PayloadPlace()],
            header=HEADER,
            shard_sha256="0" * 64,
            shard_size=0,
        )


def test_damage_is_named(tmp_path: Path) -> None:
    shard, index = write_dataset(tmp_path / "out", "parquet", make_latents(4))
    data = index.read_bytes()
    index.write_bytes(data[:-100])
    with pytest.raises(DatasetError, match=r"index/00012\.parquet: not a whole Parquet file"):
        read_index(index)
    with pytest.raises(DatasetError, match="column row_number is missing"):
        read_index(shard)
    with pytest.raises(FileNotFoundError):
        read_index(tmp_path / "nothing")


def test_rows_out_of_order_are_noticed(tmp_path: Path) -> None:
    _, index = write_dataset(tmp_path / "out", "webdataset", make_latents(4))
    table = pq.read_table(index)
    pq.write_table(table.take([1, 0, 2, 3]), index)
    with pytest.raises(DatasetError, match="row_number: expected 0, got 1"):
        read_index(index)


def test_a_flipped_bit_never_changes_a_row(tmp_path: Path) -> None:
    """Pages have checksums; what has none is checked. Only the text of the header may differ unnoticed."""
    _, index = write_dataset(tmp_path / "out", "webdataset", make_latents(6))
    data, rows = index.read_bytes(), read_index(index).rows
    rng, refused = random.Random(2), 0
    for _ in range(250):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            assert read_index(io.BytesIO(bytes(damaged))).rows == rows
        except DatasetError:
            refused += 1
    assert refused > 50
