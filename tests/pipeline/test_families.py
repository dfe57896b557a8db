"""A whole run with VAEs whose lengths, tiles and scales are not CV-VAE's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.checkpoints import VAESource
from pipeline.errors import ConfigError
from pipeline.policies import WindowPolicy
from pipeline.run import plan_run
from pipeline.storage import Store
from pipeline.verify import verify_dataset
from tests.whole_run import one_encoder, settings_for


@pytest.fixture(scope="module")
def source(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("families")
    v2d_shards(folder, num_shards=1, good=2, failed=0, broken=0)
    return folder


def test_a_run_with_micro_clips_and_a_scale_per_channel(source: Path, tmp_path: Path) -> None:
    """Windows of 34 frames, two micro clips; tails trimmed to lengths that 1 + 4k does not know."""
    settings = settings_for(str(source), str(tmp_path / "out")).model_copy(
        update={
            "vae": VAESource(spec="open-sora-1.2-tiny", options={}),
            "windows": WindowPolicy(frames=34, tail="trim", max_windows=3),
        }
    )
    with one_encoder(tmp_path / "scratch") as run:
        manifest = run(settings)
    lengths = {int(bucket.split("x")[0]) for bucket in manifest.buckets}
    assert 34 in lengths
    assert all(length % 17 in (0, 1, 5, 9, 13) for length in lengths)
    assert verify_dataset(Store(str(tmp_path / "out"))).problems == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert "by channel: shift [-0.1, 0.34, 0.27, 0.98], scale [0.2597" in card


def test_lengths_that_the_family_has_not_are_refused_before_the_run(source: Path, tmp_path: Path) -> None:
    settings = settings_for(str(source), str(tmp_path / "out")).model_copy(
        update={
            "vae": VAESource(spec="open-sora-1.2-tiny", options={}),
            "windows": WindowPolicy(frames=33),
        }
    )
    with pytest.raises(ConfigError, match=r"windows.frames: .* expected 17\*n.* nearest shorter is 30, .* longer 34"):
        plan_run(settings, {})


def test_verification_knows_the_familys_shapes(source: Path, tmp_path: Path) -> None:
    """34 frames are 10 latents of micro clips: a dataset that says another VAE made them is found out."""
    settings = settings_for(str(source), str(tmp_path / "out")).model_copy(
        update={
            "vae": VAESource(spec="open-sora-1.2-tiny", options={}),
            "windows": WindowPolicy(frames=34, max_windows=1),
        }
    )
    with one_encoder(tmp_path / "scratch") as encode:
        encode(settings)
    run_file = tmp_path / "out" / "run.json"
    run = json.loads(run_file.read_text())
    run["identity"]["vae"]["tile_frames"] = 13
    run_file.write_text(json.dumps(run))
    problems = verify_dataset(Store(str(tmp_path / "out"))).problems
    assert [text for text in problems if "no latent of the VAE has its shape" in text or "expected (4, " in text]
