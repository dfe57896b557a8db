"""Whole runs: resumed, killed, shared, split; and one that learns."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from cvvae import load_vae
from cvvae.lpips import LPIPS
from pipeline.errors import ConfigError, IdentityMismatch, PipelineError
from pipeline.storage import Store
from pipeline.training.settings import TrainSettings
from pipeline.training.train_state import load_state, saved_steps
from pipeline.training.trainer import train
from pipeline.training.workers import Workers

PROJECT = Path(__file__).resolve().parents[3]
Run = Callable[..., TrainSettings]
GAN: dict[str, Any] = {"adversarial": 0.5, "adversarial_start": 2, "discriminator_channels": 32}
SMOOTH: dict[str, Any] = {"generator": {"eps": 1e-3}, "loss": {"pixel_error": "squared"}}
"""Without what makes much of a rounding error: AdamW of a gradient that is nearly 0, L1 of a difference that is."""
TIMES = {"steps_per_second"}


def rows(settings: TrainSettings) -> list[dict[str, str]]:
    """metrics.csv without what depends on the clock."""
    text = (Path(settings.output.url) / "metrics.csv").read_text().splitlines()
    return [{name: value for name, value in row.items() if name not in TIMES} for row in csv.DictReader(text)]


def tensors(settings: TrainSettings, step: int) -> dict[str, torch.Tensor]:
    return load_state(Store(settings.output.url), step).tensors


def with_steps(settings: TrainSettings, steps: int) -> TrainSettings:
    return settings.model_copy(update={"loop": settings.loop.model_copy(update={"steps": steps})})


class Interrupted(Exception):
    pass


class StopAt:
    """Ends the run as a crash would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.resumed_at: int | None = None

    def resumed(self, step: int) -> None:
        self.resumed_at = step

    def stepped(self, step: int, figures: dict[str, float]) -> None:
        if step == self.step:
            raise Interrupted

    def evaluated(self, step: int, figures: dict[str, float]) -> None: ...


@pytest.mark.parametrize("alternate", ["parity", pytest.param("both", marks=pytest.mark.slow)])
def test_a_resumed_run_is_the_unbroken_one(tiny_run: Run, alternate: str) -> None:
    sections = {"loss": GAN, "loop": {"ema_decay": 0.9, "alternate": alternate}}
    unbroken, broken = tiny_run("unbroken", **sections), tiny_run("broken", **sections)
    train(unbroken)
    for step in (3, 5):  # after the checkpoints of 2 and 4
        with pytest.raises(Interrupted):
            train(broken, listener=StopAt(step))
    last = StopAt(-1)
    train(broken, listener=last)
    assert last.resumed_at == 4
    assert rows(broken) == rows(unbroken)
    first, second = tensors(unbroken, 6), tensors(broken, 6)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    assert any(name.startswith("average.") for name in first)
    assert any(name.startswith("discriminator_optimizer.") for name in first)


def test_a_killed_process_goes_on(tiny_run: Run, tmp_path: Path) -> None:
    unbroken, killed = tiny_run("unbroken"), tiny_run("killed")
    (tmp_path / "settings.json").write_text(killed.model_dump_json())
    script = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "from pipeline.training.settings import TrainSettings\n"
        "from pipeline.training.trainer import train\n"
        "train(TrainSettings.model_validate_json(open(sys.argv[1]).read()))\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "settings.json")]
    store = Store(killed.output.url)
    with subprocess.Popen(command, cwd=PROJECT, env={**os.environ, "PYTHONPATH": str(PROJECT)}) as process:
        deadline = time.monotonic() + 120
        while not saved_steps(store):
            assert process.poll() is None, "it ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    train(unbroken)
    train(killed)
    assert rows(killed) == rows(unbroken)
    first, second = tensors(unbroken, 6), tensors(killed, 6)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_micro_batches_give_the_whole_batchs_step(tiny_run: Run) -> None:
    data = tiny_run().data
    four = {"sources": [{**data.sources[0].model_dump(), "batch_size": 4}]}
    whole = tiny_run("whole", data=four, loop={"steps": 2}, **SMOOTH)
    split = tiny_run("split", data=four, loop={"steps": 2, "micro_batch": 1}, **SMOOTH)
    train(whole)
    train(split)
    agree(whole, split, step=2)


def test_lpips_counts_at_every_value_of_a_frame(tiny_run: Run, tmp_path: Path) -> None:
    file = tmp_path / "lpips.safetensors"
    torch.manual_seed(0)
    save_file(LPIPS("vgg").state_dict(), file)
    clips = {**tiny_run().data.sources[0].model_dump(), "size": [32, 32], "short_side": [36, 40]}  # VGG halves often
    settings: dict[str, Any] = {"data": {"sources": [clips]}, "loop": {"steps": 1}}
    plain = tiny_run("plain", **settings)
    judged = tiny_run("judged", **settings, loss={"perceptual": 0.5, "lpips_weights": str(file)})
    train(plain)
    train(judged)
    without, with_lpips = (next(row for row in rows(run) if row["l1"]) for run in (plain, judged))
    assert float(with_lpips["l1"]) == pytest.approx(float(without["l1"]))
    assert float(with_lpips["reconstruction"]) != pytest.approx(float(without["reconstruction"]))


def agree(first: TrainSettings, second: TrainSettings, *, step: int) -> None:
    """To rounding: losses, gradient norms and scores; weights to a twentieth of the largest step."""
    for one, two in zip(rows(first), rows(second), strict=True):
        assert one.keys() == two.keys()
        assert [float(one[name] or 0) for name in one] == pytest.approx([float(two[name] or 0) for name in two], 2e-3)
    weights, others = tensors(first, step), tensors(second, step)
    for name in weights:
        if name.startswith("model."):
            torch.testing.assert_close(weights[name], others[name], rtol=1e-3, atol=1e-4 * step)


_WORKER = """
import datetime, sys, torch, torch.distributed as dist
from pipeline.training.settings import TrainSettings
from pipeline.training.trainer import train
from pipeline.training.workers import Workers
torch.set_num_threads(1)
settings, meeting, rank = sys.argv[1:]
dist.init_process_group("gloo", f"file://{meeting}", datetime.timedelta(seconds=120), 2, int(rank))
train(TrainSettings.model_validate_json(open(settings).read()), Workers.joined(torch.device("cpu")))
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_workers_are_one(tiny_run: Run, tmp_path: Path) -> None:
    alone, shared = (tiny_run(name, loop={"steps": 2}, **SMOOTH) for name in ("alone", "shared"))
    (tmp_path / "settings.json").write_text(shared.model_dump_json())
    arguments = [sys.executable, "-c", _WORKER, str(tmp_path / "settings.json"), str(tmp_path / "meeting")]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "GLOO_SOCKET_IFNAME": "lo"}
    both = [subprocess.Popen([*arguments, str(rank)], cwd=PROJECT, env=environment) for rank in (0, 1)]
    try:
        train(alone)
        assert [process.wait(timeout=150) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
            process.wait()
    agree(alone, shared, step=2)


def test_it_learns_and_exports_what_it_learned(tiny_run: Run) -> None:
    settings = tiny_run(
        generator={"lr": 3e-3, "warmup_steps": 4},
        loop={"steps": 40, "ema_decay": 0.8},
        keep={"checkpoint_every": 20, "evaluate_every": 20, "log_every": 5, "tensorboard": True},
    )
    result = train(settings)
    table = rows(settings)
    l1 = [float(row["l1"]) for row in table if row.get("l1")]
    scores = {int(row["step"]): float(row["held_out_psnr"]) for row in table if row["held_out_psnr"]}
    assert sum(l1[4:]) / 4 < 0.85 * l1[0], "over batches of other clips, so a mean of several"
    assert scores[40] > scores[20] > scores[0] + 1
    assert scores[40] > scores[0] + 2
    folder = Path(settings.output.url)
    assert len(list((folder / "pictures").iterdir())) == 3
    assert len(list((folder / "tensorboard").iterdir())) == 1
    exported = load_vae(folder / "export")
    assert exported.spec.latent_channels == 4
    average = {name.removeprefix("average."): t for name, t in tensors(settings, 40).items() if "average." in name}
    assert all(torch.equal(value, average[name]) for name, value in exported.state_dict().items())
    card = (folder / "export" / "README.md").read_text()
    assert f"{scores[40]:.2f} dB" in card
    assert exported.weights_sha256 is not None
    assert exported.weights_sha256 in card
    assert result.figures["held_out_psnr"] == pytest.approx(scores[40], abs=1e-4)


def test_another_runs_folder_is_refused(tiny_run: Run) -> None:
    train(tiny_run(loop={"steps": 1}))
    with pytest.raises(IdentityMismatch, match=r"generator\.lr: the directory has 0\.002, this run has 0\.1"):
        train(tiny_run(loop={"steps": 1}, generator={"lr": 0.1}))


@pytest.mark.slow
@pytest.mark.slow
def test_a_longer_run_goes_on_from_a_finished_one(tiny_run: Run) -> None:
    settings = tiny_run(generator={"schedule": "constant"}, loop={"steps": 2})
    train(settings)
    listener = StopAt(-1)
    train(with_steps(settings, 4), listener=listener)
    assert listener.resumed_at == 2
    whole = tiny_run("whole", generator={"schedule": "constant"}, loop={"steps": 4})
    train(whole)
    first, second = tensors(settings, 4), tensors(whole, 4)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_length_that_the_vae_does_not_take(tiny_run: Run) -> None:
    data = tiny_run().data
    six = {"sources": [{**data.sources[0].model_dump(), "frames": 6}]}
    with pytest.raises(ConfigError, match=r"data\.sources\.clips: .*1 \+ 4\*k.*got 6"):
        train(tiny_run(data=six))


def test_half_precision_is_refused_on_a_cpu(tiny_run: Run) -> None:
    with pytest.raises(ConfigError, match=r"loop\.precision: expected float32 on a CPU, got bfloat16"):
        train(tiny_run(loop={"precision": "bfloat16"}))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_a_gpu(tiny_run: Run, precision: str) -> None:
    settings = tiny_run(loop={"steps": 4, "precision": precision}, loss=GAN, keep={"evaluate_every": 4})
    train(settings, Workers(device=torch.device("cuda")))
    assert {value.dtype for value in tensors(settings, 4).values()} == {torch.float32}
    (weights,) = (Path(settings.output.url) / "export").glob("*.safetensors")
    assert all(torch.isfinite(value).all() for value in load_file(weights).values())


def test_a_gradient_that_is_no_number_ends_the_run(tiny_run: Run) -> None:
    settings = tiny_run(generator={"lr": 1e30, "warmup_steps": 0})
    with pytest.raises(
        PipelineError, match=r"step \d: (loss|gradient_norm) is (nan|inf); the last checkpoint stands"
    ):
        train(settings)
