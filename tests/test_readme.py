"""The README's own lines, run."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cvvae import SPECS, save_vae, seeded_vae
from pipeline.policies import WindowPolicy
from tests.real_latents import encode_clips

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
    save_vae(seeded_vae(SPECS["cvvae-sd21-tiny"], 0), folder / "vae")
    encode_clips([tar], folder / "out", windows=WindowPolicy(max_windows=1))
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
