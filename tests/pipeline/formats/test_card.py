"""The dataset card: its YAML is what the hub expects, and `datasets` loads the folder by it."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import yaml

from pipeline.card import dataset_card
from pipeline.documents import Counts
from pipeline.manifest import build_manifest
from pipeline.policies import FormatName
from tests.pipeline.example_documents import receipt, run_file
from tests.pipeline.formats.made_latents import make_latents, write_dataset


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """datasets caches under the home directory by default."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "DOWNLOADED_DATASETS_PATH", tmp_path / "cache" / "downloads")
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", tmp_path / "cache" / "extracted")


@pytest.mark.parametrize(("format_name", "key"), [("webdataset", "__key__"), ("parquet", "id")])
def test_datasets_loads_the_folder_by_its_card(tmp_path: Path, format_name: FormatName, key: str) -> None:
    latents = make_latents(6)
    write_dataset(tmp_path / "out", format_name, latents)
    (tmp_path / "out" / "README.md").write_text(dataset_card(build_manifest(run_file(format=format_name), [], [])))
    loaded = datasets.load_dataset(str(tmp_path / "out"), split="train", streaming=True)
    assert [row[key] for row in loaded] == [latent.row.key for latent in latents]


@pytest.mark.parametrize(
    ("rows", "category"), [(0, "n<1K"), (1000, "1K<n<10K"), (9_999_999, "1M<n<10M"), (10**9, "n>1B")]
)
def test_the_header_is_yaml_that_the_hub_knows(rows: int, category: str) -> None:
    counts = Counts(windows_decoded=rows, windows_stored=rows)
    card = dataset_card(build_manifest(run_file(), [receipt(counts=counts)], []))
    _, header, body = card.split("---\n", 2)
    fields = yaml.safe_load(header)
    assert fields["size_categories"] == [category]
    assert fields["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "shards/*.tar"}]}
    ]
    assert fields["pretty_name"] == "Video latents of tiny"
    assert 'load_dataset("OUT", split="train"' in body
    assert "latent.npy" in body
