"""Places of payload values in Parquet shards: every value, several pages and row groups, and every kind of damage."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import DatasetError
from pipeline.formats import blob_offsets, parquet_format
from pipeline.formats.tensors import raw_bytes
from pipeline.records import Latent
from tests.pipeline.formats.made_latents import make_latent, stored_order, write_shard


def offsets_of(data: bytes, lengths: list[int], column: str = "vae_latent_bytes") -> list[int]:
    return blob_offsets(lambda start, stop: data[start:stop], len(data), column, lengths, "shard").tolist()


def made(count: int) -> list[Latent]:
    sizes = ((17, 16, 16), (33, 64, 64))
    return stored_order(
        [make_latent(f"k{number:05d}_00000", size=sizes[number % 2], logvar=True) for number in range(count)]
    )


@pytest.mark.parametrize(("count", "group_bytes"), [(1, 1 << 20), (40, 20_000), (3000, 64 << 20)])
def test_every_value_is_where_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, group_bytes: int
) -> None:
    """3,000 rows are more than pyarrow puts into one page."""
    monkeypatch.setattr(parquet_format, "ROW_GROUP_BYTES", group_bytes)
    latents = made(count)
    path, _ = write_shard(tmp_path, "parquet", latents)
    data = path.read_bytes()
    lengths = [latent.mean_CTHW.nbytes for latent in latents]
    for column, name in (("vae_latent_bytes", "mean_CTHW"), ("vae_logvar_bytes", "logvar_CTHW")):
        places = offsets_of(data, lengths, column)
        for latent, start, length in zip(latents, places, lengths, strict=True):
            assert data[start : start + length] == raw_bytes(getattr(latent, name))


def test_other_lengths_than_the_index_says(tmp_path: Path) -> None:
    latents = made(8)
    path, _ = write_shard(tmp_path, "parquet", latents)
    data, lengths = path.read_bytes(), [latent.mean_CTHW.nbytes for latent in latents]
    with pytest.raises(DatasetError, match="expected 7 rows, got 8"):
        offsets_of(data, lengths[:7])
    with pytest.raises(DatasetError, match="has not the values its index says"):
        offsets_of(data, [length + 2 for length in lengths])
    with pytest.raises(DatasetError, match="column nothing is missing"):
        offsets_of(data, lengths, "nothing")


@pytest.mark.parametrize("options", [{"compression": "zstd"}, {"data_page_version": "2.0"}, {"use_dictionary": True}])
def test_values_that_are_not_plain_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    settings = {"compression": "none", "use_dictionary": False} | options
    pq.write_table(pa.table({"blob": [b"abcd", b"efgh"]}), tmp_path / "x.parquet", **settings)  # type: ignore[arg-type]
    with pytest.raises(DatasetError):
        offsets_of((tmp_path / "x.parquet").read_bytes(), [4, 4], "blob")


def test_nulls_are_refused(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"blob": [b"abcd", None]}), tmp_path / "x.parquet", compression="none", use_dictionary=False
    )
    with pytest.raises(DatasetError):
        offsets_of((tmp_path / "x.parquet").read_bytes(), [4, 4], "blob")


def test_damage_anywhere_is_an_error_or_does_no_harm(tmp_path: Path) -> None:
    """Each byte outside the numbers changed in turn, and the file cut at each length."""
    latents = made(2)
    path, _ = write_shard(tmp_path, "parquet", latents)
    data, lengths = path.read_bytes(), [latent.mean_CTHW.nbytes for latent in latents]
    places = offsets_of(data, lengths)
    first = min(places) - 120
    for at in [*range(first, min(places)), *range(len(data) - 400, len(data))]:
        changed = bytearray(data)
        changed[at] ^= 0x41
        try:
            assert len(offsets_of(bytes(changed), lengths)) == len(lengths)
        except DatasetError:
            continue
    for length in range(0, len(data), 97):
        with pytest.raises(DatasetError):
            offsets_of(data[:length], lengths)
