"""The headline's experiments, on few windows and steps with seeded VAEs: that they run and compare like with like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cvvae.i3d import I3D
from examples.headline_experiments import compare_convergence, compare_finetuning, fvd_of_samples, relative_loss
from examples.train_latent_diffusion import Settings
from pipeline.policies import WindowPolicy
from tests.real_latents import encode_clips

SHARED = Settings(batch_size=2, width=32, depth=1, warmup=1, sampler_steps=2, checkpoint_every=4)


@pytest.fixture(scope="module")
def runs(
    v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Settings, Settings]:
    """A run on image latents of every fourth frame, and what runs on video latents of all frames need."""
    folder = tmp_path_factory.mktemp("headline")
    tars = v2d_shards(folder / "source", num_shards=1, good=2, failed=0, broken=0)
    every_fourth = WindowPolicy(frames=5, frame_stride=4, window_stride=4, max_windows=1)
    encode_clips(tars, folder / "image", vae="sd-tiny", windows=every_fourth)
    encode_clips(tars, folder / "video", windows=WindowPolicy(max_windows=1))
    image = replace(SHARED, data=str(folder / "image"), vae="sd-tiny", out=str(folder / "base"), steps=8)
    return image, replace(SHARED, data=str(folder / "video"), vae="cvvae-sd21-tiny")


def test_ways_of_finetuning(runs: tuple[Settings, Settings], tmp_path: Path) -> None:
    image, video = runs
    results = compare_finetuning(image, video, tmp_path, steps=8)
    assert results["everything"] < results["nothing finetuned"]
    assert relative_loss(replace(video, out=str(tmp_path / "output"))) == results["output"]
    again = compare_finetuning(image, video, tmp_path, steps=8)  # every run is made once
    assert again == results
    assert results["output"] != results["nothing finetuned"]


def test_convergence_starts_from_the_same_model(runs: tuple[Settings, Settings], tmp_path: Path) -> None:
    image, video = runs
    ways = {name: replace(video, out=str(tmp_path / name)) for name in ("one", "other")}
    curves = compare_convergence(image, ways, marks=(2, 4))
    assert [mark for mark, _ in curves["one"]] == [0, 2, 4]
    assert curves["one"] == curves["other"]


def test_fvd_of_samples_needs_only_a_run(runs: tuple[Settings, Settings]) -> None:
    image, video = runs
    torch.manual_seed(0)
    found = fvd_of_samples(replace(video, out=image.out), I3D().eval())
    assert found["clips"] == 2
    assert found["fvd"] > 0
