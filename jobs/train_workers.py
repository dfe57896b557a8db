"""Ray Train around the loop: workers with a process group, started again after a loss.

Ray Train brings the workers up, joins them and replaces them; what is kept, and where a run goes on, is the loop's
own (pipeline/training/train_state.py), so that a run without Ray and one with it read each other's checkpoints.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import ray
import ray.train
import torch
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from jobs.finetune_config import WorkersConfig
from pipeline.errors import ConfigError, IdentityMismatch, PipelineError, SourceError
from pipeline.training.settings import TrainSettings
from pipeline.training.steps import Figures
from pipeline.training.trainer import Listener, train
from pipeline.training.workers import Workers

POLL_SECONDS = 0.5


class Notes:
    """A small actor beside the driver: what the first worker has told since it was last asked, and how it ended."""

    def __init__(self) -> None:
        self._notes: list[tuple[str, int, Figures]] = []
        self._end: dict[str, Any] | None = None

    def add(self, kind: str, step: int, figures: Figures) -> None:
        self._notes.append((kind, step, figures))

    def take(self) -> list[tuple[str, int, Figures]]:
        notes, self._notes = self._notes, []
        return notes

    def finish(self, end: dict[str, Any]) -> None:
        self._end = end

    def end(self) -> dict[str, Any] | None:
        return self._end


class _Teller:
    """A listener whose words go to the driver; nobody waits for them."""

    def __init__(self, notes: Any) -> None:
        self._notes = notes

    def resumed(self, step: int) -> None:
        self._notes.add.remote("resumed", step, {})

    def stepped(self, step: int, figures: Figures) -> None:
        self._notes.add.remote("stepped", step, figures)

    def evaluated(self, step: int, figures: Figures) -> None:
        self._notes.add.remote("evaluated", step, figures)


def train_on_ray(settings: TrainSettings, config: WorkersConfig, listener: Listener) -> dict[str, Any]:
    """Run on a connected Ray; what `trainer.RunResult` says, as a dict. ConfigError if the cluster has no room or the
    workers do not divide the lanes; PipelineError with a worker's own error."""
    count, gpus, cpus = _shape(settings, config)
    actor_type: Any = ray.remote(num_cpus=0)(Notes)
    notes: Any = actor_type.remote()
    loop = {
        "settings": settings.model_dump_json(),
        "notes": notes,
        "threads": config.threads or max(1, cpus - settings.data.decode_children),
    }
    with tempfile.TemporaryDirectory(prefix="ray-train-") as folder:
        trainer = TorchTrainer(
            _work,
            train_loop_config=loop,
            scaling_config=ScalingConfig(
                num_workers=count,
                use_gpu=gpus > 0,
                resources_per_worker={"CPU": cpus, **({"GPU": gpus} if gpus else {})},
            ),
            run_config=RunConfig(
                name="finetune",
                storage_path=folder,  # Ray Train's own notes: nothing is kept there
                failure_config=FailureConfig(max_failures=config.max_failures),
            ),
        )
        _fit(trainer, notes, listener)
    end: Any = ray.get(notes.end.remote())
    if end is None:
        raise PipelineError("the workers ended without a result")
    if "error" in end:
        raise PipelineError(end["error"])
    return end


def _shape(settings: TrainSettings, config: WorkersConfig) -> tuple[int, float, int]:
    """Workers, GPUs and cores of each. ConfigError if they do not fit."""
    resources = ray.cluster_resources()
    gpus = config.gpus if config.gpus is not None else float(resources.get("GPU", 0) > 0)
    count = config.count or (int(resources.get("GPU", 0) / gpus) if gpus else 1)
    cpus = config.cpus or 1 + settings.data.decode_children
    if settings.data.lanes % count:
        raise ConfigError(f"data.lanes: expected a multiple of the {count} workers, got {settings.data.lanes}")
    for name, each in (("CPU", float(cpus)), ("GPU", gpus)):
        if count * each > resources.get(name, 0):
            raise ConfigError(
                f"workers: {count} of {each:g} {name} each do not fit: the cluster has {resources.get(name, 0):g}"
            )
    return count, gpus, cpus


def _fit(trainer: TorchTrainer, notes: Any, listener: Listener) -> None:
    """`fit`, while another thread passes on what the first worker tells."""
    done = threading.Event()
    thread = threading.Thread(target=_listen, args=(notes, listener, done), name="notes", daemon=True)
    thread.start()
    try:
        trainer.fit()
    except (RayError, RuntimeError) as error:
        raise PipelineError(f"training failed on the cluster: {error}") from error
    finally:
        done.set()
        thread.join()


def _listen(notes: Any, listener: Listener, done: threading.Event) -> None:
    tell: dict[str, Callable[[int, Figures], None]] = {
        "resumed": lambda step, _: listener.resumed(step),
        "stepped": listener.stepped,
        "evaluated": listener.evaluated,
    }
    while True:
        last = done.wait(POLL_SECONDS)
        with suppress(RayError):  # progress is not worth a run
            for kind, step, figures in ray.get(notes.take.remote()):
                tell[kind](step, figures)
        if last:
            return


def _work(loop: dict[str, Any]) -> None:
    """On each worker. What the user must mend ends the run instead of starting the workers again."""
    torch.set_num_threads(loop["threads"])
    workers = Workers.joined(get_device())
    notes = loop["notes"]
    try:
        result = train(TrainSettings.model_validate_json(loop["settings"]), workers, _Teller(notes))
    except (ConfigError, IdentityMismatch, SourceError) as error:
        ray.get(notes.finish.remote({"error": f"{type(error).__name__}: {error}"}))
        return
    if workers.is_first:
        end = {"steps": result.steps, "figures": result.figures, "export_url": result.export_url}
        ray.get(notes.finish.remote(end))
