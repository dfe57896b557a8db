"""The example trainer on real clips: it learns them, stops anywhere, goes on bit for bit, draws what it learned."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from examples.train_latent_diffusion import LatentTransformer, Settings, draw, on_path, train
from tests.real_latents import encode_clips

PROJECT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def settings(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """Two real clips, four windows of 17 x 32 x 32, and a model that learns in seconds."""
    folder = tmp_path_factory.mktemp("latents")
    encode_clips(v2d_shards(folder / "source", num_shards=1, good=2, failed=0, broken=0), folder / "latents")
    return Settings(
        data=str(folder / "latents"), vae="cvvae-sd21-tiny", out="", batch_size=2, steps=8, width=32, depth=1,
        warmup=1, checkpoint_every=3, sample_every=4, sampler_steps=2,
    )  # fmt: skip


def losses(settings: Settings) -> list[float]:
    lines = (Path(settings.out) / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [json.loads(line)["loss"] for line in lines]


def equal(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("captions", [0.0, 0.3])
def test_stopped_in_the_middle_of_an_epoch_it_goes_on_bit_for_bit(
    settings: Settings, tmp_path: Path, captions: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = replace(settings, out=str(tmp_path / "whole"), captions=captions)
    stopped = replace(whole, out=str(tmp_path / "stopped"))
    train(whole)

    class Killed(Exception):
        pass

    real_step = torch.optim.AdamW.step

    def dies_in_step_6(self: torch.optim.AdamW, *arguments: object) -> None:
        if self.state and next(iter(self.state.values()))["step"] == 5:
            raise Killed
        real_step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", dies_in_step_6)
        with pytest.raises(Killed):
            train(stopped)
    assert len(losses(stopped)) == 5  # of which the last two are after the checkpoint
    train(stopped)

    assert losses(stopped) == losses(whole)
    ends = [torch.load(Path(run.out) / "checkpoint.pt", weights_only=True) for run in (whole, stopped)]
    assert ends[0]["reader"]["batches"] == 8
    for part in ("model", "average", "optimizer", "reader"):
        assert equal(ends[0][part], ends[1][part]), part
    last = [Path(run.out) / "samples-000008.png" for run in (whole, stopped)]
    assert last[0].read_bytes() == last[1].read_bytes()


def test_pictures_before_during_and_after(settings: Settings, tmp_path: Path) -> None:
    train(replace(settings, out=str(tmp_path)))
    for name in ("real", "samples-000000", "samples-000004", "samples-000008"):
        with Image.open(tmp_path / f"{name}.png") as grid, Image.open(tmp_path / f"{name}.gif") as moving:
            assert grid.size == (17 * 32, 4 * 32)
            assert (moving.size, moving.n_frames) == ((4 * 32, 32), 17)  # type: ignore[attr-defined]


@pytest.mark.parametrize("objective", ["flow", "v"])
def test_it_learns_one_clip_and_draws_it(settings: Settings, objective: str) -> None:
    """Eight numbers are all there is to learn: what is drawn from noise must come close to them."""
    torch.manual_seed(0)
    small = replace(settings, objective=objective, sampler_steps=20)
    model, clip = LatentTransformer(4, small), torch.randn(1, 4, 2, 2, 2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(300):
        noise, time_B = torch.randn(16, 4, 2, 2, 2), torch.rand(16)
        x, velocity = on_path(objective, clip.expand_as(noise), noise, time_B)
        loss = (model(x, time_B, [""] * 16) - velocity).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    drawn = draw(model, torch.randn(4, 4, 2, 2, 2), [""] * 4, small)
    assert (drawn - clip).square().mean().sqrt() < 0.25  # unlearned: 1.4


def test_only_the_output_layer(settings: Settings, tmp_path: Path) -> None:
    """The minimal finetuning: from another run's weights, everything but the last layer stays."""
    train(replace(settings, out=str(tmp_path / "first"), steps=3))
    start = tmp_path / "first" / "checkpoint.pt"
    train(replace(settings, out=str(tmp_path / "second"), steps=3, start_from=str(start), train_only="output"))
    before = torch.load(start, weights_only=True)["average"]
    after = torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["model"]
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"output.weight", "output.bias"}


def test_what_does_not_fit_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the one that"):
        train(replace(settings, out=str(tmp_path), vae="cvvae-sd3-tiny"))
    with pytest.raises(ValueError, match="expected flow or v"):
        replace(settings, objective="w")
    with pytest.raises(ValueError, match="expected sides that patches of"):
        train(replace(settings, out=str(tmp_path), patch=3))


@pytest.mark.slow
def test_two_ranks_under_torchrun(settings: Settings, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        f"--{name.replace('_', '-')}={value}" for name, value in vars(replace(settings, out=str(tmp_path))).items()
    ]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1"]
    script = PROJECT / "examples" / "train_latent_diffusion.py"
    subprocess.run(
        [*command, f"--master-port={port}", str(script), *options],
        check=True,
        cwd=PROJECT,
        env=os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
    )
    assert len(losses(replace(settings, out=str(tmp_path)))) == 8
