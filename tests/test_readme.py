"""The README's own lines, run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, save_vae, seeded_vae
from pipeline.decode.pool import DecodePool
from pipeline.documents import RunFile, RunIdentity
from pipeline.encoder import TileEncoder
from pipeline.manifest import build_manifest
from pipeline.policies import DecodePolicy, EncodePolicy, ResizePolicy, WindowPolicy
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.storage import Store

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_after(marker: str) -> str:
    match = re.search(rf"<!-- {marker} -->\n```python\n(.*?)```", README, re.DOTALL)
    assert match is not None, marker
    return match.group(1)


@pytest.fixture(scope="module")
def dataset(v2d_shards, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One small shard with a manifest."""
    folder = tmp_path_factory.mktemp("readme")
    (tar,) = v2d_shards(folder / "source", num_shards=1, good=1, failed=0, broken=0)
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], 0)
    save_vae(vae, folder / "vae")
    windows, resize = WindowPolicy(max_windows=1), ResizePolicy(buckets=((32, 32),))
    assert vae.weights_sha256 is not None
    identity = RunIdentity(
        weights_sha256=vae.weights_sha256,
        vae=vae.spec.to_dict(),
        windows=windows,
        resize=resize,
        decode_backends=("pyav",),
        compute_dtype="float32",
        storage_dtype="float16",
        logvar=False,
    )
    source = WebDatasetSource(urls=str(tar))
    job = ShardJob(
        source=source,
        windows=windows,
        resize=resize,
        decode=DecodePolicy(),
        identity=identity,
        format="webdataset",
        store=Store(str(folder / "out")),
    )
    scratch = Scratch(folder / "scratch")
    with DecodePool(DecodePolicy(backends=("pyav",)), 1) as pool:
        encoder = ShardEncoder(job, TileEncoder(vae, EncodePolicy(), torch.device("cpu")), pool, scratch)
        receipt = encoder.run(plan_source(source).shards[0]).receipt
    scratch.close()
    run = RunFile(fingerprint=identity.fingerprint, identity=identity, format="webdataset", source={}, config={})
    (folder / "out" / "manifest.json").write_bytes(build_manifest(run, [receipt], ()).to_bytes())
    return folder


def test_seven_lines_read_a_shard(dataset: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = code_after("seven-lines")
    assert len([line for line in code.splitlines() if line]) == 7
    scope: dict[str, object] = {}
    exec(code.replace("data/demo/latents", str(dataset / "out")), scope)
    assert "(4, 5, 4, 4)" in capsys.readouterr().out
    assert np.isfinite(scope["z"]).all()


def test_latents_decode_back(dataset: Path) -> None:
    code = code_after("decode-back").replace("path/to/vae3d_v1-1", str(dataset / "vae"))
    scope: dict[str, object] = {"mean": np.zeros((4, 5, 4, 4), dtype=np.float16)}
    exec(code, scope)
    video = scope["video"]
    assert isinstance(video, torch.Tensor)
    assert video.shape == (1, 3, 17, 32, 32)
