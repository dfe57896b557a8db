"""Exports and plain shards through the real MosaicML Streaming, LitData and Energon (tests/foreign_readers.py)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from pipeline.records import Latent
from tests.foreign_readers import STREAMING, reader_packages, run_reader
from tests.pipeline.export.test_export import export
from tests.pipeline.reader.made_datasets import write_dataset

SMALL = "00017x00016x00016"
READ_STREAMING = (
    STREAMING
    + """
import hashlib, json, sys
from streaming.base.dataset import StreamingDataset
dataset = StreamingDataset(
    remote=sys.argv[1], local=sys.argv[2], batch_size=2, shuffle=True, validate_hash="sha256"
)
rows = {s["id"]: (s["caption"], s["latent_shape"], hashlib.sha256(s["latent"]).hexdigest()) for s in dataset}
print(json.dumps(rows))
"""
)
READ_LITDATA = """
import hashlib, json, sys
from litdata import StreamingDataset
dataset = StreamingDataset(sys.argv[1], shuffle=True)
rows = {s["id"]: (s["caption"], s["latent_shape"], hashlib.sha256(s["latent"]).hexdigest()) for s in dataset}
print(json.dumps(rows))
"""
ENERGON = "import sys; from megatron.energon.cli.main import main; sys.argv[0] = 'energon'; main()"
READ_ENERGON = """
import hashlib, json, sys
from megatron.energon import WorkerConfig, get_loader, get_train_dataset
dataset = get_train_dataset(
    sys.argv[1], worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0), batch_size=None,
    shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False,
)
shape = lambda array: ",".join(map(str, array.shape))
rows = {s.__key__: (s.caption, shape(s.image), hashlib.sha256(s.image).hexdigest()) for s in get_loader(dataset)}
print(json.dumps(rows))
"""


def rows_of(latents: list[Latent]) -> dict[str, list[str]]:
    return {
        latent.row.key: [
            latent.row.caption,
            ",".join(map(str, latent.row.latent_shape)),
            hashlib.sha256(latent.mean_CTHW.numpy().tobytes()).hexdigest(),
        ]
        for latent in latents
    }


@pytest.mark.parametrize(
    "code", [READ_STREAMING, pytest.param(READ_LITDATA, marks=pytest.mark.slow)], ids=["streaming", "litdata"]
)
def test_mds(tmp_path: Path, code: str) -> None:
    made = write_dataset(tmp_path / "latents", shards=2, small=5, long=1)
    export(tmp_path / "latents", tmp_path / "out", format="mds")
    printed = run_reader(code, str(tmp_path / "out" / SMALL), str(tmp_path / "local"), folder=tmp_path)
    assert json.loads(printed) == rows_of([latent for latent in made.values() if latent.row.bucket == SMALL])


@pytest.mark.slow
def test_energon_prepares_lints_and_reads_our_tars(tmp_path: Path) -> None:
    """In a folder of links: it writes its own index beside the tars."""
    made = write_dataset(tmp_path / "latents", shards=2, small=5, long=1)
    folder = tmp_path / "energon"
    folder.mkdir()
    for tar in (tmp_path / "latents" / "shards").iterdir():
        (folder / tar.name).symlink_to(tar)
    fields = json.dumps({"image": "latent.npy", "caption": "txt"})
    options = [
        "--non-interactive",
        "--split-ratio",
        "1,0,0",
        "--sample-type",
        "CaptioningSample",
        "--num-workers",
        "1",
    ]
    run_reader(ENERGON, "prepare", *options, "--field-map", fields, str(folder), folder=tmp_path)
    run_reader(ENERGON, "lint", "--split-parts", "train", str(folder), folder=tmp_path)
    printed = run_reader(READ_ENERGON, str(folder), folder=tmp_path)
    assert json.loads(printed.splitlines()[-1]) == rows_of(list(made.values()))
    assert reader_packages().is_dir()
