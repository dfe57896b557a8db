"""What a run shows on the terminal: a plan, a progress bar, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from pipeline.dataflow import ActorShape
from pipeline.documents import Counts, Manifest, ShardReceipt
from pipeline.planning.compare import Compared
from pipeline.planning.estimate import Estimate
from pipeline.run import EncodeSettings, RunLog, RunPlan

STAGES = {"wait for encoder": "wait for the VAE, busy with another shard"}


class RunDisplay:
    """The terminal side of `run_encode`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._num_actors = 0
        self._first_report: tuple[float, float] | None = None
        """When the first frames were reported, and how many."""
        self._counts = Counts()

    def starting(self, settings: EncodeSettings) -> None:
        if settings.vae.is_seeded:
            self._console.print(
                f"[yellow]The VAE {settings.vae.spec} has seeded random weights (seed {settings.vae.seed}): its "
                "latents show that the pipeline works and mean nothing to a model.[/]",
                soft_wrap=True,
            )

    def planned(self, plan: RunPlan) -> None:
        identity = plan.run_file.identity
        samples = f" ({plan.samples_todo} samples)" if plan.samples_todo else ""
        self._console.print(
            f"{_number(len(plan.shards), 'shard')}, {len(plan.shards) - len(plan.todo)} committed before, "
            f"{len(plan.todo)} to encode{samples} with {identity.vae.get('name')} "
            f"(weights {identity.weights_sha256[:12]}) into {plan.dataset.store.full_url('')}",
            soft_wrap=True,
        )

    @contextmanager
    def encoding(self, plan: RunPlan, shape: ActorShape) -> Iterator[None]:
        """A progress bar over the shards while the body runs."""
        device = f"{shape.num_gpus:g} GPU" if shape.num_gpus else f"{shape.encode_threads} CPU threads"
        self._num_actors = shape.num_actors
        actors = _number(shape.num_actors, "encode actor")
        each = " each" if shape.num_actors > 1 else ""
        elsewhere = f" and {shape.remote_decoders} on other nodes" if shape.remote_decoders else ""
        decoders = f"{_number(shape.decode_children, 'decode process', 'es')}{elsewhere}"
        self._console.print(f"{actors} ({device}, {decoders}{each})")
        columns = (
            SpinnerColumn(),
            TextColumn("encoding"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("shards  {task.fields[figures]}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            self._bar = progress.add_task("encode", total=len(plan.todo), figures="starting the encoders")
            self._progress = progress
            try:
                yield
            finally:
                self._progress = None

    def progress(self, encoders: dict[str, dict[str, float]]) -> None:
        """Figures of the encoders, every few seconds, from another thread."""
        frames = sum(figures["window_frames"] for figures in encoders.values())
        if not frames:
            return
        if self._first_report is None:
            self._first_report = time.monotonic(), frames
        then, before = self._first_report
        waiting = max(0, self._num_actors - len(encoders))
        text = f"{frames:.0f} frames" + (f", {_number(waiting, 'encoder')} to come up" if waiting else "")
        if frames > before:
            text += f", {(frames - before) / (time.monotonic() - then):.1f}/s"
        self._show(text)

    def committed(self, receipt: ShardReceipt) -> None:
        self._counts = self._counts.plus(receipt.counts)
        if self._progress is not None and self._bar is not None:
            self._progress.advance(self._bar)
        if self._first_report is None:  # a run that is over before the encoders report
            self._show(f"{self._counts.frames_stored} frames")

    def _show(self, figures: str) -> None:
        if self._progress is not None and self._bar is not None:
            self._progress.update(self._bar, figures=figures)

    def stopped(self, plan: RunPlan, committed: int) -> None:
        """The run was interrupted."""
        committed += len(plan.shards) - len(plan.todo)
        self._console.print(
            f"stopped: {committed} of {len(plan.shards)} shards are committed and stay; start the same command again "
            "to encode the rest",
            soft_wrap=True,
        )

    def finished(self, plan: RunPlan, manifest: Manifest, log: RunLog) -> None:
        """The table of the whole dataset, and of this run's time."""
        counts = manifest.counts
        table = Table(title="dataset", show_header=False, title_justify="left")
        table.add_row("shards", str(len(manifest.shards)))
        table.add_row("clips encoded", f"{counts.clips_encoded} of {counts.samples} samples")
        table.add_row("windows stored", str(counts.windows_stored))
        for bucket, rows in manifest.buckets.items():
            table.add_row(f"  {bucket}", str(rows))
        table.add_row("rejected", str(counts.clips_rejected + counts.windows_rejected))
        for name, number in manifest.rejections.items():
            table.add_row(f"  {name}", str(number))
        table.add_row("frames stored", str(counts.frames_stored))
        table.add_row("frames in dropped tails", str(counts.frames_dropped_tail))
        if counts.frames_unused:
            table.add_row("frames between windows", str(counts.frames_unused))
        if counts.clips_cut_short:
            table.add_row("clips longer than max_windows", str(counts.clips_cut_short))
        table.add_row("payload bytes", f"{manifest.payload_bytes:,}")
        for name, number in manifest.decoders.items():
            table.add_row(f"windows read by {name}", str(number))
        self._console.print(table)
        if self._counts.samples:
            self._console.print(self._time_table(log))
        if manifest.set_aside:
            self._console.print(f"[yellow]set aside: {', '.join(manifest.set_aside)}[/]")
        self._console.print(f"dataset: {plan.dataset.store.full_url('')}", soft_wrap=True)

    def compared(self, compared: list[Compared]) -> None:
        """What was planned beside what came, if there was a plan."""
        if not compared:
            return
        table = Table("figure", "planned", "came", "", title="plan against what came", title_justify="left")
        for one in compared:
            mark = "" if one.inside else "[yellow]outside[/]"
            table.add_row(one.name, shown(one.planned), _figure(one.actual), mark)
        self._console.print(table)

    def _time_table(self, log: RunLog) -> Table:
        wall = time.time() - log.started
        frames = self._counts.frames_stored
        table = Table(title="this run", show_header=False, title_justify="left")
        table.add_row("wall time", f"{wall:.1f} s, planning and start-up included")
        table.add_row("frames/s", f"{frames / wall:.1f} stored")
        stages: dict[str, float] = {}
        for seconds in log.shard_seconds.values():
            for name, value in seconds.items():
                stages[name] = stages.get(name, 0.0) + value
        for name, value in stages.items():
            table.add_row(f"  {STAGES.get(name, name)}", f"{value:.1f} s over all shards")
        return table


def shown(estimate: Estimate) -> str:
    """A figure with its interval."""
    return f"{_figure(estimate.value)} ({_figure(estimate.low)} to {_figure(estimate.high)})"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _number(count: int, noun: str, plural: str = "s") -> str:
    return f"{count} {noun}" + (plural if count != 1 else "")
