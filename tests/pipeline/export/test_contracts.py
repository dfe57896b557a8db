"""The bytes of an export against what the formats' own documents say, taken apart by hand."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.errors import DatasetError
from pipeline.export import FastVideoExport, MDSExport
from tests.pipeline.export.test_export import export
from tests.pipeline.formats.made_latents import make_latent
from tests.pipeline.reader.made_datasets import write_dataset

SMALL = "00017x00016x00016"


def test_fastvideo_rows_are_what_its_reader_takes(tmp_path: Path) -> None:
    """Its reader: every .parquet below a folder; a row group per row; float32 whatever else is written; one shape."""
    made = write_dataset(tmp_path / "latents", shards=2, small=3, long=1, dtype="bfloat16")
    export(tmp_path / "latents", tmp_path / "out", format="fastvideo")
    folder = tmp_path / "out" / SMALL
    files = [Path(root) / name for root, _, names in os.walk(folder) for name in names if name.endswith(".parquet")]
    rows = [row for file in sorted(files) for row in pq.read_table(file).to_pylist()]
    assert [row["id"] for row in rows] == [key for key, latent in made.items() if latent.row.bucket == SMALL]
    batch_BCTHW = np.stack(
        [np.frombuffer(row["vae_latent_bytes"], np.float32).reshape(row["vae_latent_shape"]) for row in rows]
    )
    expected = torch.stack([made[row["id"]].mean_CTHW.float() for row in rows])
    assert torch.equal(torch.from_numpy(batch_BCTHW), expected)
    for row in rows:
        assert (row["vae_latent_dtype"], row["text_embedding_bytes"], row["media_type"]) == ("float32", b"", "video")
        assert (row["num_frames"], row["width"], row["height"], row["fps"]) == (17, 16, 16, 25.0)
        assert row["caption"] == made[row["id"]].row.caption
    assert pq.read_schema(files[0]).field("vae_latent_shape").type == pa.list_(pa.int64())


def test_fastvideo_row_groups_are_small(tmp_path: Path) -> None:
    latents = [make_latent(f"clip{number}_00000", size=(17, 256, 256)) for number in range(60)]
    (file,) = FastVideoExport().write(tmp_path, "00012", latents)
    assert pq.ParquetFile(file.path).num_row_groups == 2
    assert [row.key for row in FastVideoExport().read(file.path)] == [latent.row.key for latent in latents]


def test_mds_bytes(tmp_path: Path) -> None:
    made = write_dataset(tmp_path / "latents", shards=2, small=3, long=1)
    export(tmp_path / "latents", tmp_path / "out", format="mds")
    folder = tmp_path / "out" / SMALL
    index = json.loads((folder / "index.json").read_text())
    assert index["version"] == 2
    assert [shard["samples"] for shard in index["shards"]] == [3, 4]
    entry = index["shards"][0]
    zipped = (folder / entry["zip_data"]["basename"]).read_bytes()
    assert len(zipped) == entry["zip_data"]["bytes"]
    raw = pa.Codec("zstd").decompress(zipped, entry["raw_data"]["bytes"], asbytes=True)
    count, *offsets = struct.unpack_from("<5I", raw)
    assert (count, offsets[-1]) == (3, len(raw))
    config = json.loads(raw[20 : offsets[0]])
    shared = ("column_names", "column_encodings", "column_sizes", "compression", "format", "version", "size_limit")
    assert {name: config[name] for name in shared} == {name: entry[name] for name in shared}
    sample = raw[offsets[1] : offsets[2]]
    names = config["column_names"]
    assert names == sorted(names)
    sizes = struct.unpack_from(f"<{len(names)}I", sample)
    values, at = {}, 4 * len(names)
    for name, size in zip(names, sizes):
        values[name], at = sample[at : at + size], at + size
    latent = made[values["id"].decode()]
    numbers = np.frombuffer(values["latent"], values["latent_dtype"].decode())
    assert torch.equal(torch.from_numpy(numbers.copy()).reshape(latent.row.latent_shape), latent.mean_CTHW)
    assert values["latent_shape"].decode() == ",".join(map(str, latent.row.latent_shape))
    assert json.loads(values["fields"])["frame_times"] == list(latent.row.frame_times)


def test_mds_files_have_a_limit(tmp_path: Path) -> None:
    latents = [make_latent(f"clip{number}_00000") for number in range(5)]
    files = MDSExport(size_limit=3000).write(tmp_path, "00012", latents)
    assert [file.rows for file in files] == [2, 2, 1]
    assert [file.path.name for file in files] == [f"00012.{number:05d}.mds.zstd" for number in range(3)]
    read = [row for file in files for row in MDSExport().read(file.path)]
    assert [row.key for row in read] == [latent.row.key for latent in latents]


@pytest.mark.parametrize("cut", [1, 200])
def test_a_cut_file_is_not_read(tmp_path: Path, cut: int) -> None:
    (file,) = MDSExport().write(tmp_path, "00012", [make_latent(f"clip{number}_00000") for number in range(5)])
    raw = pa.Codec("zstd").decompress(file.path.read_bytes(), file.entry["raw_data"]["bytes"], asbytes=True)
    file.path.write_bytes(pa.Codec("zstd").compress(raw[:-cut], asbytes=True))
    with pytest.raises(DatasetError, match="expected"):
        list(MDSExport().read(file.path))
