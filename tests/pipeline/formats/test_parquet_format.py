"""The Parquet file itself: schema, row groups, encodings, and files that are not what they should be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DatasetError
from pipeline.formats import FORMATS, HEADER_KEY, SHARD_SCHEMA
from pipeline.formats.arrow_columns import ROW_COLUMNS
from pipeline.formats.fields import RowFields
from tests.pipeline.formats.made_latents import HEADER, index_rows, make_latent, make_latents, read_bytes, write_shard

# FastVideo's t2v schema, less its text embeddings
FASTVIDEO = {
    "id": pa.string(),
    "vae_latent_bytes": pa.binary(),
    "vae_latent_shape": pa.list_(pa.int64()),
    "vae_latent_dtype": pa.string(),
    "file_name": pa.string(),
    "caption": pa.string(),
    "media_type": pa.string(),
    "width": pa.int64(),
    "height": pa.int64(),
    "num_frames": pa.int64(),
    "duration_sec": pa.float64(),
    "fps": pa.float64(),
}


def test_schema_is_a_superset_of_fastvideos(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "parquet", make_latents())
    schema = pq.read_schema(path)
    for name, kind in FASTVIDEO.items():
        assert schema.field(name).type == kind
    assert schema.names[-2:] == ["vae_latent_bytes", "vae_logvar_bytes"], "payload last"
    assert HEADER_KEY.encode() in schema.metadata


def test_columns_follow_the_fields() -> None:
    assert [field.name for field in ROW_COLUMNS] == list(RowFields.model_fields)


@pytest.mark.parametrize("logvar", [False, True])
def test_one_schema_with_and_without_logvar(tmp_path: Path, logvar: bool) -> None:
    path, _ = write_shard(tmp_path, "parquet", make_latents(logvar=logvar))
    assert pq.read_schema(path).remove_metadata() == SHARD_SCHEMA
    table = pq.read_table(path)
    for name in ("vae_logvar_bytes", "vae_logvar_shape", "vae_logvar_dtype"):
        assert table[name].null_count == (0 if logvar else table.num_rows)


def test_bytes_are_the_bare_numbers(tmp_path: Path) -> None:
    (latent,) = latents = [make_latent(dtype="bfloat16")]
    path, _ = write_shard(tmp_path, "parquet", latents)
    (row,) = pq.read_table(path).to_pylist()
    assert row["vae_latent_dtype"] == "bfloat16"
    tensor = torch.frombuffer(bytearray(row["vae_latent_bytes"]), dtype=torch.bfloat16)
    assert tensor.reshape(row["vae_latent_shape"]).equal(latent.mean_CTHW)


def test_a_row_group_holds_one_bucket(tmp_path: Path) -> None:
    latents = make_latents(8)
    path, places = write_shard(tmp_path, "parquet", latents)
    parquet = pq.ParquetFile(path)
    buckets = [
        parquet.read_row_group(group)["bucket"].unique().to_pylist() for group in range(parquet.num_row_groups)
    ]
    assert buckets == [[bucket] for bucket in sorted({latent.row.bucket for latent in latents})]
    for latent, place in zip(latents, places, strict=True):
        assert place.row_group is not None
        assert place.row_in_group is not None
        assert parquet.read_row_group(place.row_group)["id"][place.row_in_group].as_py() == latent.row.key
        assert place.latent_offset is place.logvar_length is None


def test_row_groups_are_bounded(tmp_path: Path) -> None:
    """With the real bound: 80 MiB of one bucket make two row groups, each below 100 MB."""
    shape = (4, 16, 128, 128)
    latent = make_latent(latent_shape=shape)
    blank = torch.zeros(shape, dtype=torch.float16)  # 2 MiB
    latents = [replace(latent, row=replace(latent.row, key=f"k{n:02d}_00000"), mean_CTHW=blank) for n in range(40)]
    path, places = write_shard(tmp_path, "parquet", latents)
    metadata = pq.read_metadata(path)
    sizes = [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    assert len(sizes) == 2
    assert max(sizes) < 100_000_000
    assert [place.row_in_group for place in places].count(0) == 2


def test_text_is_large_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.formats.parquet_format.ROW_GROUP_BYTES", 10_000)
    latents = [make_latent(f"k{n}_00000", caption="x" * 6000) for n in range(4)]
    path, _ = write_shard(tmp_path, "parquet", latents)
    assert pq.read_metadata(path).num_row_groups == 4


def test_payload_is_plain_and_the_rest_is_not(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "parquet", make_latents(logvar=True))
    group = pq.read_metadata(path).row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    for name, column in columns.items():
        blob = name in ("vae_latent_bytes", "vae_logvar_bytes")
        assert column.compression == ("UNCOMPRESSED" if blob else "ZSTD"), name
        assert column.is_stats_set == (not blob), name
        assert "RLE_DICTIONARY" not in column.encodings or not blob, name
    assert "RLE_DICTIONARY" in columns["caption"].encodings


def rewrite(path: Path, change: dict[str, Any], metadata: dict[bytes, bytes] | None = None) -> Path:
    """The shard again, with some columns' values replaced (None drops the column)."""
    table = pq.read_table(path)
    for name, value in change.items():
        at = table.schema.get_field_index(name)
        table = table.remove_column(at)
        if value is not None:
            kind = SHARD_SCHEMA.field(name).type if not isinstance(value, pa.Array) else value.type
            column = value if isinstance(value, pa.Array) else pa.array([value] * table.num_rows, kind)
            table = table.add_column(at, name, column)
    if metadata is not None:
        table = table.replace_schema_metadata(metadata)
    broken = path.with_name("broken.parquet")
    pq.write_table(table, broken)
    return broken


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_latent_bytes": b"1234"}, r"vae_latent_bytes: float16 of shape \(4, 5, 2, 2\) needs 160 bytes, got 4"),
        ({"vae_latent_bytes": pa.array([None], pa.binary())}, "vae_latent_bytes is null"),
        ({"vae_latent_bytes": None}, "column vae_latent_bytes is missing"),
        ({"width": pa.array(["16"])}, "column width: expected int64, got string"),
        ({"vae_latent_dtype": "object"}, "vae_latent_dtype: Input should be"),
        ({"vae_latent_shape": [4, 5, 2]}, "vae_latent_shape: "),
        ({"vae_latent_shape": [1 << 40, 1 << 40, 1, 1]}, "needs .* bytes, got 160"),
        ({"vae_logvar_bytes": b"1234"}, "vae_logvar_bytes: float16"),
        ({"has_logvar": True}, "logvar: expected"),
        ({"caption": pa.array([None], pa.string())}, "caption: "),
        ({"bucket": "00001x00001x00001"}, "bucket: expected"),
    ],
)
def test_hostile_columns(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path, _ = write_shard(tmp_path, "parquet", [make_latent()])
    with (
        rewrite(path, change).open("rb") as file,
        pytest.raises(DatasetError, match=rf"broken\.parquet: .*{message}"),
    ):
        list(FORMATS["parquet"].read(file))


def test_two_buckets_in_a_row_group_are_noticed(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "parquet", make_latents(4))
    with rewrite(path, {}).open("rb") as file, pytest.raises(DatasetError, match="a row group holds one"):
        list(FORMATS["parquet"].read(file))


def test_columns_of_other_people_do_not_matter(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "parquet", [make_latent()])
    table = pq.read_table(path).append_column("aesthetic_score", pa.array([5.5]))
    pq.write_table(table, path)
    with path.open("rb") as file:
        assert [latent.row for latent in FORMATS["parquet"].read(file)] == [make_latent().row]


def test_no_header_is_named(tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, "parquet", [make_latent()])
    with rewrite(path, {}, metadata={}).open("rb") as file, pytest.raises(DatasetError, match=r"no CVVAE\.header"):
        FORMATS["parquet"].read_header(file)


def test_fetch_notices_a_stale_index(tmp_path: Path) -> None:
    latents = make_latents(4)
    path, places = write_shard(tmp_path, "parquet", latents)
    rows = index_rows(latents, places)
    wrong = [
        replace(rows[0], row=rows[1].row),
        replace(rows[0], row_group=99),
        replace(rows[0], row_in_group=99),
        replace(rows[0], row_group=None),
    ]
    for row in wrong:
        with (
            path.open("rb") as file,
            pytest.raises(DatasetError, match=r"00012\.parquet: .*(leads to|expected|no row)"),
        ):
            list(FORMATS["parquet"].fetch(file, [row]))


def test_a_flipped_bit_of_the_payload_is_noticed(tmp_path: Path) -> None:
    (latent,) = latents = [make_latent()]
    path, _ = write_shard(tmp_path, "parquet", latents)
    data = bytearray(path.read_bytes())
    data[data.index(latent.mean_CTHW.numpy().tobytes()) + 17] ^= 1
    with pytest.raises(DatasetError, match=r"damaged Parquet file: .*CRC"):
        read_bytes("parquet", bytes(data))


def test_a_damaged_page_header_never_loses_rows(tmp_path: Path) -> None:
    """Page headers have no checksum, and Arrow gives as many rows as its shortest column has."""
    latents = [make_latent(f"k{number}_00000") for number in range(5)]
    path, _ = write_shard(tmp_path, "parquet", latents)
    data, rows = path.read_bytes(), [latent.row for latent in latents]
    group = pq.read_metadata(path).row_group(0)
    refused = 0
    for column in (group.column(0), group.column(group.num_columns - 2)):
        for position in range(column.data_page_offset, column.data_page_offset + 24):
            for bit in range(8):
                damaged = bytearray(data)
                damaged[position] ^= 1 << bit
                try:
                    assert [latent.row for latent in read_bytes("parquet", bytes(damaged))] == rows
                except DatasetError:
                    refused += 1
    assert refused > 50


@pytest.mark.parametrize("error", [ConnectionResetError(104, "Connection reset by peer"), OSError(5, "I/O error")])
def test_a_store_that_fails_is_no_damage(tmp_path: Path, error: OSError) -> None:
    """A network error must stay one: it is retried, a damaged file is not."""

    class Unreachable:
        name = "s3://bucket/key"
        closed = False

        def __init__(self, path: Path) -> None:
            self.file = path.open("rb")
            self.reads = 0

        def read(self, size: int = -1) -> bytes:
            self.reads += 1
            if self.reads > 2:
                raise error
            return self.file.read(size)

        def __getattr__(self, attribute: str) -> Any:
            return getattr(self.file, attribute)

    path, _ = write_shard(tmp_path, "parquet", make_latents(6))
    with pytest.raises(type(error)):
        list(FORMATS["parquet"].read(Unreachable(path)))  # type: ignore[arg-type]
    assert FORMATS["parquet"].read_header(path.open("rb")) == HEADER
