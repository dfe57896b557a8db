"""What a run tells of itself: metrics.csv, TensorBoard's event files, pictures of reconstructions.

metrics.csv is written whole with each checkpoint and evaluation, and a resumed run drops what lies after the step it
goes on from: an interrupted run leaves the same file as an undisturbed one but for the times.
"""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.errors import ConfigError
from pipeline.storage import Store

METRICS_NAME = "metrics.csv"
EVENTS_FOLDER = "tensorboard"
STEP = "step"


class MetricsTable:
    """Rows of numbers by step; a column appears when its first value does."""

    def __init__(self, store: Store, *, resume_at: int) -> None:
        """Rows of a run that is resumed at that step are kept up to it."""
        self._store = store
        self._rows = [row for row in _read_rows(store) if int(row[STEP]) <= resume_at]

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Values of a step; a second call for the same step adds columns to its row."""
        if not self._rows or int(self._rows[-1][STEP]) != step:
            self._rows.append({STEP: str(step)})
        self._rows[-1].update({name: f"{value:.7g}" for name, value in values.items()})

    def write(self) -> None:
        columns = {STEP: None} | {name: None for row in self._rows for name in row}
        text = io.StringIO()
        writer = csv.DictWriter(text, list(columns), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        self._store.replace(METRICS_NAME, text.getvalue().encode())


def _read_rows(store: Store) -> list[dict[str, str]]:
    try:
        text = store.read_bytes(METRICS_NAME).decode()
    except FileNotFoundError:
        return []
    rows = csv.DictReader(io.StringIO(text))
    return [{name: value for name, value in row.items() if value} for row in rows]


class EventFiles:
    """TensorBoard's files under tensorboard/: written there, or beside and uploaded where the store is not local."""

    def __init__(self, store: Store, *, resume_at: int) -> None:
        """ConfigError if TensorBoard is not installed."""
        if find_spec("tensorboard") is None:
            raise ConfigError("keep.tensorboard: needs the extra 'finetune': pip install 'cvvae-latents[finetune]'")
        from torch.utils.tensorboard import SummaryWriter

        self._store = store
        self._beside = None if store.is_local else tempfile.TemporaryDirectory(prefix="tensorboard-")
        self._folder = Path(self._beside.name if self._beside else store.path(EVENTS_FOLDER))
        # what an interrupted run wrote after the step it is resumed at is hidden
        self._writer = SummaryWriter(str(self._folder), purge_step=resume_at + 1 if resume_at else None)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, picture_HWC: np.ndarray) -> None:
        self._writer.add_image("reconstructions", picture_HWC, step, dataformats="HWC")

    def write(self) -> None:
        self._writer.flush()
        if self._beside is not None:
            for path in self._folder.iterdir():
                self._store.replace(f"{EVENTS_FOLDER}/{path.name}", path.read_bytes())

    def close(self) -> None:
        self._writer.close()
        if self._beside is not None:
            self._beside.cleanup()


class RunReports:
    """All of it, for the one worker that writes."""

    def __init__(self, store: Store, *, resume_at: int, tensorboard: bool) -> None:
        self._store = store
        self._table = MetricsTable(store, resume_at=resume_at)
        self._events = EventFiles(store, resume_at=resume_at) if tensorboard else None

    def add(self, step: int, values: Mapping[str, float]) -> None:
        self._table.add(step, values)
        if self._events is not None:
            self._events.add(step, values)

    def picture(self, step: int, clips: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Store pairs of source and reconstruction, uint8 THWC, as pictures/STEP.png."""
        picture_HWC = side_by_side(clips)
        encoded = io.BytesIO()
        Image.fromarray(picture_HWC).save(encoded, "png")
        self._store.replace(f"pictures/{step:08d}.png", encoded.getvalue())
        if self._events is not None:
            self._events.picture(step, picture_HWC)

    def write(self) -> None:
        self._table.write()
        if self._events is not None:
            self._events.write()

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def side_by_side(clips: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """(H, W, 3) uint8: a row for each clip, its first, middle and last frame, each beside its reconstruction."""
    rows: list[np.ndarray] = []
    for source_THWC, decoded_THWC in clips:
        last = len(source_THWC) - 1
        frames = sorted({0, last // 2, last})
        rows.append(np.concatenate([each[t] for t in frames for each in (source_THWC, decoded_THWC)], axis=1))
    return np.concatenate(rows, axis=0)
