"""A run with a VAE of diffusers, from a named spec and from a folder as its hub page has it."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cvvae import SPECS, save_vae, seeded_vae
from cvvae.diffusers_cogvideox import CogVideoXSpec
from pipeline.checkpoints import VAESource
from pipeline.errors import IdentityMismatch
from pipeline.sources import WebDatasetSource
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.whole_run import Run, one_encoder, settings_for

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with one_encoder(tmp_path_factory.mktemp("scratch")) as run:
        yield run


@pytest.fixture(scope="module")
def source(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> str:
    (tar,) = v2d_shards(tmp_path_factory.mktemp("peers") / "source", num_shards=1, good=2, failed=0, broken=0)
    return str(tar)


def test_a_named_spec_and_its_release_are_in_the_dataset(run: Run, source: str, tmp_path: Path) -> None:
    run(settings_for(source, str(tmp_path / "out"), vae=VAESource(spec="wan21-tiny", options={})))
    report = verify_dataset(Store(str(tmp_path / "out")), source=WebDatasetSource(urls=source))
    assert report.problems == []
    identity = json.loads((tmp_path / "out" / "manifest.json").read_text())["identity"]["vae"]
    assert identity == SPECS["wan21-tiny"].to_dict()
    (receipt,) = (tmp_path / "out" / "receipts").iterdir()
    libraries = json.loads(receipt.read_text())["numerics"]["libraries"]
    assert libraries["diffusers"] == importlib.metadata.version("diffusers")


def test_a_folder_is_a_checkpoint_and_another_chunk_another_identity(run: Run, source: str, tmp_path: Path) -> None:
    spec = SPECS["cogvideox-tiny"]
    assert isinstance(spec, CogVideoXSpec)
    for name, changed in (("vae", spec), ("longer", replace(spec, chunk_frames=16))):
        save_vae(seeded_vae(changed, seed=1), tmp_path / name)
    out = str(tmp_path / "out")
    run(settings_for(source, out, vae=VAESource(checkpoint=str(tmp_path / "vae"), options={})))
    assert verify_dataset(Store(out), source=WebDatasetSource(urls=source)).problems == []
    with pytest.raises(IdentityMismatch, match="chunk_frames"):
        run(settings_for(source, out, vae=VAESource(checkpoint=str(tmp_path / "longer"), options={})))
