"""A run of training on one of its workers: resume, step, report, evaluate, keep, export.

Every worker runs this same code; the first one writes. Started again after anything whatever, a run goes on from its
last checkpoint and has the loss curve of one that was never interrupted.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.dataset import leaf_differences
from pipeline.errors import IdentityMismatch, PipelineError
from pipeline.storage import Store
from pipeline.training.batches import Batch, Loader, Positions, held_out_frames, plan_shards, to_video
from pipeline.training.draws import Position
from pipeline.training.ema import MovingAverage
from pipeline.training.evaluation import evaluate
from pipeline.training.export import ExportFacts, export_model
from pipeline.training.players import build_players
from pipeline.training.reports import RunReports
from pipeline.training.schedule import adamw, rate_at, set_rate
from pipeline.training.settings import TrainSettings, portable
from pipeline.training.steps import Figures, Precision, Stepper
from pipeline.training.train_state import (
    TrainState,
    load_latest,
    named,
    optimizer_tensors,
    prune,
    restore_optimizer,
    save_state,
    with_prefix,
)
from pipeline.training.workers import Workers

log = logging.getLogger(__name__)

RUN_FILE = "run.json"
RUN_FORMAT = 1
SCORE = "held_out_psnr"


class Listener(Protocol):
    """Who is told how far the first worker is."""

    def resumed(self, step: int) -> None: ...

    def stepped(self, step: int, figures: Figures) -> None: ...

    def evaluated(self, step: int, figures: Figures) -> None: ...


class Silent:
    """A listener that does not care."""

    def resumed(self, step: int) -> None: ...

    def stepped(self, step: int, figures: Figures) -> None: ...

    def evaluated(self, step: int, figures: Figures) -> None: ...


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a finished run leaves."""

    steps: int
    figures: Figures
    """The last evaluation's, and the last logged ones."""
    export_url: str


@dataclass(slots=True)
class _Progress:
    """What a checkpoint keeps beside the tensors."""

    step: int = 0
    positions: Positions = field(default_factory=dict)
    skipped: Counter[str] = field(default_factory=Counter)
    best: tuple[int, float] | None = None
    """Step and score of the best evaluation that has a checkpoint."""
    first_score: float | None = None
    """The score before the first step."""


def train(settings: TrainSettings, workers: Workers | None = None, listener: Listener | None = None) -> RunResult:
    """Run, or resume, all of it; call on every worker. ConfigError and SourceError for what the settings ask for,
    IdentityMismatch if the output belongs to another run, StorageError, DatasetError."""
    store = Store(settings.output.url, options=settings.output.options, single_driver=settings.output.single_driver)
    return _Run(settings, workers or Workers(), listener or Silent(), store).run()


class _Run:
    def __init__(self, settings: TrainSettings, workers: Workers, listener: Listener, store: Store) -> None:
        self.settings, self.workers, self.listener, self.store = settings, workers, listener, store
        self.progress = _Progress()
        self.precision = Precision(settings.loop.precision, workers.device)
        self._figures: dict[str, list[float]] = {}
        self._last: Figures = {}
        self._scored_at = -1
        self._logged = 0, time.monotonic()
        """The step of the last row, and when it was."""

    def run(self) -> RunResult:
        settings, workers = self.settings, self.workers
        # every worker ends over what the first one finds, or the others would wait for it
        refused = workers.first_says(_claim(self.store, settings) if workers.is_first else None)
        if refused is not None:
            raise IdentityMismatch(refused)
        shards = {source.name: plan_shards(source) for source in settings.data.sources}
        self.players, self.provenance = build_players(settings, workers.device)
        self.stepper = self._stepper()
        decay = settings.loop.ema_decay
        self.average = MovingAverage(self.players.model, decay) if decay is not None else None
        self._resume()
        held_out = settings.data.held_out
        self.held_out = (
            held_out_frames(held_out, settings.data.held_out_samples, rank=workers.rank, num_workers=workers.size)
            if held_out
            else []
        )
        with ExitStack() as stack:
            self.reports = self._reports(stack)
            if not self.progress.step:
                self._evaluate(0)
            loader = Loader(
                settings.data,
                shards,
                seed=settings.loop.seed,
                start=self.progress.step,
                stop=settings.loop.steps,
                positions=self.progress.positions,
                rank=workers.rank,
                num_workers=workers.size,
            )
            self._logged = self.progress.step, time.monotonic()
            for batch in stack.enter_context(loader):
                self._step(batch)
            return self._finish()

    # --- a step --------------------------------------------------------------------------------------------------

    def _step(self, batch: Batch) -> None:
        keep = self.settings.keep
        self._set_rates(batch.step)
        figures = self._train(batch)
        self._note(batch, figures)
        done = self.progress.step
        last = done == self.settings.loop.steps
        if done % keep.log_every == 0 or last:
            self._log(done)
        if done % keep.evaluate_every == 0 or last:
            self._evaluate(done)
        if done % keep.checkpoint_every == 0 or last:
            self._checkpoint()

    def _train(self, batch: Batch) -> Figures:
        has_gan = self.settings.loss.weights().has_gan(batch.step)
        alternates = self.settings.loop.alternate == "parity"
        if has_gan and alternates and batch.step % 2:
            return self.stepper.discriminator_step(batch)
        figures, reconstructions = self.stepper.generator_step(batch)
        for name in ("loss", "gradient_norm"):
            # scaled gradients may overflow: the scaler then leaves the step out
            if not math.isfinite(figures[name]) and not (name == "gradient_norm" and self.precision.scaled):
                raise PipelineError(f"step {batch.step}: {name} is {figures[name]}; the last checkpoint stands")
        if self.average is not None:
            self.average.update(self.players.model)
        if has_gan and not alternates:
            figures |= self.stepper.discriminator_step(batch, reconstructions)
        return figures

    def _set_rates(self, step: int) -> None:
        for name, optimizer in self.stepper.optimizers.items():
            set_rate(optimizer, rate_at(getattr(self.settings, name), step, self.settings.loop.steps))

    def _note(self, batch: Batch, figures: Figures) -> None:
        self.progress.step = batch.step + 1
        self.progress.positions.setdefault(batch.source, {}).update(batch.positions)
        self.progress.skipped.update(batch.skipped)
        for name, value in {**figures, f"loss_{batch.source}": figures.get("loss", math.nan)}.items():
            if not math.isnan(value):
                self._figures.setdefault(name, []).append(value)
        if self.workers.is_first:
            self.listener.stepped(self.progress.step, figures)

    # --- reports -------------------------------------------------------------------------------------------------

    def _log(self, step: int) -> None:
        """A row of means over the steps and workers since the last."""
        gathered = self.workers.gather((self._figures, self.progress.skipped))
        self._figures = {}
        means: Figures = {}
        for name in dict.fromkeys(name for figures, _ in gathered for name in figures):
            values = [value for figures, _ in gathered for value in figures.get(name, ())]
            means[name] = sum(values) / len(values)
        means["skipped_samples"] = float(sum(sum(skipped.values()) for _, skipped in gathered))
        for name in self.stepper.optimizers:
            means[f"{name}_rate"] = rate_at(getattr(self.settings, name), step - 1, self.settings.loop.steps)
        now = time.monotonic()
        means["steps_per_second"] = (step - self._logged[0]) / (now - self._logged[1])
        self._logged = step, now
        self._last |= means
        if self.reports is not None:
            self.reports.add(step, means)

    def _evaluate(self, step: int) -> None:
        """On the moving average where there is one."""
        if self.settings.data.held_out is None:
            return
        with ExitStack() as stack:
            if self.average is not None:
                stack.enter_context(self.average.in_place_of(self.players.model))
            result = evaluate(self.players.model, self.held_out, self.workers, self.precision.autocast())
        self._last |= result.figures
        self._scored_at = step
        if step == 0:
            self.progress.first_score = result.figures[SCORE]
        if self.reports is not None:
            self.reports.add(step, result.figures)
            every = self.settings.keep.pictures_every or self.settings.keep.evaluate_every
            if step % every == 0 or step == self.settings.loop.steps:
                self.reports.picture(step, result.pictured)
            self.reports.write()
            self.listener.evaluated(step, result.figures)

    def _reports(self, stack: ExitStack) -> RunReports | None:
        if not self.workers.is_first:
            return None
        reports = RunReports(self.store, resume_at=self.progress.step, tensorboard=self.settings.keep.tensorboard)
        stack.callback(reports.close)
        return reports

    # --- checkpoints ---------------------------------------------------------------------------------------------

    def _stepper(self) -> Stepper:
        settings, players = self.settings, self.players
        judge = players.discriminator
        return Stepper(
            players,
            self.workers,
            adamw(players.generator_parameters(), settings.generator),
            adamw(list(judge.parameters()), settings.discriminator) if judge is not None else None,
            precision=self.precision,
            seed=settings.loop.seed,
            micro_batch=settings.loop.micro_batch,
            clip_norm=settings.loop.clip_norm,
        )

    def _checkpoint(self) -> None:
        gathered = self.workers.gather((self.progress.positions, self.progress.skipped))
        score = self._last.get(SCORE) if self._scored_at == self.progress.step else None
        if score is not None and (self.progress.best is None or score > self.progress.best[1]):
            self.progress.best = (self.progress.step, score)
        if self.reports is None:
            return
        positions: dict[str, dict[str, list[int]]] = {}
        for each, _ in gathered:
            for source, lanes in each.items():
                positions.setdefault(source, {}).update({str(k): at.to_list() for k, at in lanes.items()})
        document = {
            "positions": positions,
            "skipped": dict(sum((skipped for _, skipped in gathered), Counter())),
            "best": self.progress.best,
            "first_score": self.progress.first_score,
            "average_updates": self.average.num_updates if self.average else None,
            "scalers": {name: scaler.state_dict() for name, scaler in self.stepper.scalers.items()},
            "figures": self._last,
        }
        self.reports.write()  # before: rows after a checkpoint are dropped by who resumes, rows before it are gone
        save_state(self.store, TrainState(step=self.progress.step, tensors=self._tensors(), document=document))
        best = self.progress.best[0] if self.progress.best else None
        prune(self.store, keep_last=self.settings.keep.keep_last, best=best)

    def _tensors(self) -> dict[str, Any]:
        parts = {"model": self.players.model, "loss": self.players.loss, "judge": self.players.discriminator}
        tensors = {
            name: value
            for prefix, module in parts.items()
            if module is not None
            for name, value in named(module.state_dict(), prefix).items()
        }
        if self.average is not None:
            tensors |= named(self.average.values, "average")
        for name, optimizer in self.stepper.optimizers.items():
            tensors |= optimizer_tensors(optimizer, f"{name}_optimizer")
        return tensors

    def _resume(self) -> None:
        """From the newest whole checkpoint. Every worker reads the one that the first worker names."""
        state = load_latest(self.store)
        steps = self.workers.gather(state.step if state else 0)
        if len(set(steps)) > 1:
            raise PipelineError(f"workers see different checkpoints (steps {steps}): is {self.store.url} shared?")
        if state is None:
            return
        document, players = state.document, self.players
        players.model.load_state_dict(with_prefix(state.tensors, "model"))
        players.loss.load_state_dict(with_prefix(state.tensors, "loss"))
        if players.discriminator is not None:
            players.discriminator.load_state_dict(with_prefix(state.tensors, "judge"))
        if self.average is not None:
            self.average.load(with_prefix(state.tensors, "average"), document["average_updates"])
        for name, optimizer in self.stepper.optimizers.items():
            restore_optimizer(optimizer, state.tensors, f"{name}_optimizer")
            self.stepper.scalers[name].load_state_dict(document["scalers"][name])
        self.progress = _Progress(
            step=state.step,
            positions={
                source: {int(lane): Position.from_list(at) for lane, at in lanes.items()}
                for source, lanes in document["positions"].items()
            },
            # once, or every worker would count them again
            skipped=Counter(document["skipped"]) if self.workers.is_first else Counter(),
            best=tuple(document["best"]) if document["best"] else None,
            first_score=document["first_score"],
        )
        self._last = document["figures"]
        if self.workers.is_first:
            self.listener.resumed(state.step)

    def _finish(self) -> RunResult:
        skipped: Counter[str] = sum((part for part in self.workers.gather(self.progress.skipped)), Counter())
        if self.workers.is_first:
            facts = ExportFacts(
                settings=self.settings,
                steps=self.progress.step,
                figures=self._last,
                first_score=self.progress.first_score,
                skipped=dict(skipped),
                provenance=self.provenance,
            )
            with ExitStack() as stack:
                if self.average is not None:
                    stack.enter_context(self.average.in_place_of(self.players.model))
                clips = (to_video(frames_THWC[None], self.workers.device) for _, frames_THWC in self.held_out)
                export_model(self.store, self.players.model, facts, clips)
            if self.reports is not None:
                self.reports.write()
        self.workers.gather(None)  # nobody leaves before the export stands
        return RunResult(self.progress.step, self._last, self.store.full_url("export"))


def _claim(store: Store, settings: TrainSettings) -> str | None:
    """Write run.json, or see that the run here is this one: what is wrong, naming the settings that differ."""
    store.require_conditional_writes()
    document = {"format": RUN_FORMAT, "identity": portable(settings.identity())}
    if store.create(RUN_FILE, json.dumps(document, indent=1).encode()):
        return None
    there = json.loads(store.read_bytes(RUN_FILE))
    if there == document:
        return None
    differing = leaf_differences("", there.get("identity", {}), document["identity"])
    return (
        f"{store.full_url('')}: the run there has other settings: {'; '.join(differing)}. Give another output.url, "
        "or the settings it was begun with"
    )
