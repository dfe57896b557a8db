"""int8 log variances are of version 1 because nobody from before them can misread a dataset that has some."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds

from pipeline.documents import FORMAT_VERSION, Manifest, RunFile, RunIdentity
from pipeline.errors import DatasetError
from tests.pipeline.reader.made_datasets import write_dataset


class IdentityBefore(RunIdentity):
    logvar: bool  # type: ignore[assignment] - as it was


class ManifestBefore(Manifest):
    identity: IdentityBefore


class RunFileBefore(RunFile):
    identity: IdentityBefore


@pytest.mark.parametrize("logvar", [True, "int8"])
def test_a_reader_from_before_refuses_the_documents(tmp_path: Path, logvar: bool | str) -> None:
    write_dataset(tmp_path, shards=1, logvar=logvar)
    for kind, name in ((ManifestBefore, "manifest.json"), (RunFileBefore, "run.json")):
        content = (tmp_path / name).read_bytes()
        if logvar is True:
            assert kind.from_bytes(content, name).format_version == FORMAT_VERSION == 1
            continue
        with pytest.raises(DatasetError, match=r"identity\.logvar\s+Input should be a valid boolean"):
            kind.from_bytes(content, name)


@pytest.mark.parametrize("logvar", [True, "int8"])
def test_a_shard_alone_tells_codes_from_log_variances(tmp_path: Path, logvar: bool | str) -> None:
    """Readers from before accept the latents' dtype only."""
    expected = "float16" if logvar is True else "int8"
    write_dataset(tmp_path / "tar", shards=1, logvar=logvar)
    samples = list(wds.WebDataset(str(tmp_path / "tar" / "shards" / "00000.tar"), shardshuffle=False))
    assert {np.load(io.BytesIO(one["logvar.npy"])).dtype.name for one in samples} == {expected}
    write_dataset(tmp_path / "parquet", shards=1, logvar=logvar, format_name="parquet")
    table = pq.read_table(tmp_path / "parquet" / "shards" / "00000.parquet")
    assert set(table.column("vae_logvar_dtype").to_pylist()) == {expected}
    assert set(table.column("vae_latent_dtype").to_pylist()) == {"float16"}
