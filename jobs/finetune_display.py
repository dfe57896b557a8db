"""What a finetune run shows on the terminal: a progress bar, a line per evaluation, a table at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from pipeline.training.settings import TrainSettings
from pipeline.training.steps import Figures

SHOWN = ("l1", "loss", "discriminator_loss")


class FinetuneDisplay:
    """A `trainer.Listener`. On a log instead of a terminal it writes a line every `LINE_SECONDS`."""

    LINE_SECONDS = 30.0

    def __init__(self, settings: TrainSettings, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False)
        self._steps = settings.loop.steps
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps  {task.fields[figures]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=self._console)
        self._bar = self._progress.add_task("train", total=self._steps, figures="starting")
        self._figures: Figures = {}
        self._spoke = time.monotonic()

    def resumed(self, step: int) -> None:
        self._console.print(f"resumed after step {step} of {self._steps}")
        self._progress.update(self._bar, completed=step)

    def stepped(self, step: int, figures: Figures) -> None:
        self._figures |= {name: figures[name] for name in SHOWN if name in figures}
        text = "  ".join(f"{name} {value:.4g}" for name, value in self._figures.items())
        self._progress.update(self._bar, completed=step, figures=text)
        if not self._console.is_terminal and time.monotonic() - self._spoke > self.LINE_SECONDS:
            self._spoke = time.monotonic()
            self._console.print(f"step {step} of {self._steps}: {text}")

    def evaluated(self, step: int, figures: Figures) -> None:
        samples = int(figures["held_out_samples"])
        self._console.print(f"step {step}: held-out PSNR {figures['held_out_psnr']:.2f} dB ({samples} samples)")

    def finished(self, end: dict[str, Any]) -> None:
        """The table of the run's end."""
        table = Table(title="run", show_header=False, title_justify="left")
        table.add_row("steps", str(end["steps"]))
        for name, value in end["figures"].items():
            table.add_row(name, f"{value:.5g}")
        self._console.print(table)
        self._console.print(f"exported: {end['export_url']}", soft_wrap=True)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
