"""The evaluation itself: clips through every VAE, one window in memory at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from cvvae import VideoVAE
from cvvae.i3d import MIN_FRAMES, NUM_LOGITS
from cvvae.metrics import group_positions
from jobs.evaluation.clips import ClipFile, SourceWindow, WindowReader, find_clips
from jobs.evaluation.compatibility import CompatibilityMeasure, Judge
from jobs.evaluation.compatibility_page import StripKeeper
from jobs.evaluation.compatibility_tables import compatibility_section
from jobs.evaluation.examples import Gallery
from jobs.evaluation.measure import Measure, Measured, NonFinite, Posterior, window_pixels
from jobs.evaluation.motion import FLOW_SIZE, MotionMeter, choose_evenly, quantile_edges
from jobs.evaluation.presets import ClipShape, FittedShape, Metric, Preset, fit_shape
from jobs.evaluation.totals import ShapeTotals, motion_table, read_windows, write_line, write_window
from jobs.metric_weights import find_i3d, find_lpips
from pipeline.decode.pool import DecodePool
from pipeline.errors import ConfigError, RejectionClass, SourceError
from pipeline.policies import DecodePolicy
from pipeline.records import Rejection

WINDOWS_NAME = "windows.jsonl"
COMPATIBILITY_NAME = "compatibility.jsonl"


@dataclass(frozen=True, slots=True)
class NamedVAE:
    """A VAE on its device, in its dtype."""

    vae: VideoVAE
    is_seeded: bool
    """Its weights are random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """Everything that decides the report."""

    preset: Preset
    vaes: Mapping[str, NamedVAE]
    clips: tuple[str, ...]
    windows_per_clip: int = 1
    motion: Literal["auto", "on", "off"] = "auto"
    motion_buckets: int = 4
    posterior: Posterior = "mode"
    device: torch.device
    seed: int = 0
    decode_children: int = 2
    judge: Judge | None = None
    """The image VAE that the VAEs' latents are held against."""


class Pictures(NamedTuple):
    """The windows that the page shows."""

    gallery: Gallery
    strips: StripKeeper


def run_evaluation(evaluation: Evaluation, folder: Path, console: Console) -> tuple[dict[str, Any], Pictures]:
    """The report and the kept windows; writes windows.jsonl to `folder`, and compatibility.jsonl with a judge.

    ConfigError for settings that do not fit the VAEs or missing weights, SourceError if no clip can be evaluated.
    """
    notes = _notes_on(evaluation)
    shapes = _fit_shapes(evaluation, notes)
    measures = {fitted.shape: measure for fitted, measure in zip(shapes, _measures(evaluation, shapes), strict=True)}
    meter = _motion_meter(evaluation, notes)
    files = find_clips(evaluation.clips, limit=evaluation.preset.limit, seed=evaluation.seed)
    pictures = Pictures(Gallery(), StripKeeper())
    path = folder / WINDOWS_NAME
    with (
        _whole_file(path) as record,
        _compatibility(evaluation, folder, pictures.strips, notes) as compatibility,
        DecodePool(DecodePolicy(), evaluation.decode_children) as pool,
        _progress(console) as progress,
    ):
        reader = WindowReader(
            pool, frame_stride=evaluation.preset.frame_stride, windows_per_clip=evaluation.windows_per_clip
        )
        if evaluation.preset.motion_subset is not None:
            assert meter is not None
            reader.only = _even_in_motion(evaluation, reader, files, shapes[0], meter, notes, progress)
        runner = _Runner(reader, files, meter, pictures.gallery, compatibility, progress)
        totals = [runner.run(fitted, measures[fitted.shape], record) for fitted in shapes]
        decoders = pool.decoders
        failures = sorted((*reader.failures.values(), *runner.failures), key=lambda one: (one.key, one.error_class))
        if not any(total.windows for total in totals):
            raise SourceError(_nothing_message(files, failures))
    notes += _notes_on_totals(totals)
    report = _describe(evaluation, decoders) | {
        "results": [total.to_json() for total in totals],
        "motion": _by_motion(path, [total.shape for total in totals], evaluation) if meter is not None else [],
        "notes": notes,
        "clips": {"files": len(files), "chosen": None if reader.only is None else len(reader.only)},
        "failures": [asdict(failure) for failure in failures],
    }
    if evaluation.judge is not None:
        lines = {
            total.shape: _lines_of(folder / COMPATIBILITY_NAME, total.shape) for total in totals if total.windows
        }
        report["compatibility"] = compatibility_section(evaluation.judge, lines, evaluation.motion_buckets)
    return report, pictures


@contextmanager
def _whole_file(path: Path) -> Iterator[TextIO]:
    """A text file to write that is there when the body has ended well, and else is not."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with part.open("w", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def _compatibility(
    evaluation: Evaluation, folder: Path, strips: StripKeeper, notes: list[str]
) -> Iterator[_Compatibility | None]:
    """What measures against the judge, with its file open; None without one."""
    if evaluation.judge is None:
        yield None
        return
    measure = CompatibilityMeasure(
        evaluation.judge,
        {label: named.vae for label, named in evaluation.vaes.items()},
        with_ssim="ssim" in evaluation.preset.metrics,
        seed=evaluation.seed,
    )
    notes += measure.notes
    with _whole_file(folder / COMPATIBILITY_NAME) as file:
        yield _Compatibility(measure, file, strips)


# --- before -------------------------------------------------------------------------------------------------------


def _notes_on(evaluation: Evaluation) -> list[str]:
    seeded = [label for label, named in evaluation.vaes.items() if named.is_seeded]
    return [f"{', '.join(seeded)}: random weights, whose figures mean nothing"] if seeded else []


def _fit_shapes(evaluation: Evaluation, notes: list[str]) -> list[FittedShape]:
    specs = [named.vae.spec for named in evaluation.vaes.values()]
    shapes: dict[ClipShape, FittedShape] = {}
    for shape in evaluation.preset.shapes:
        fitted = fit_shape(shape, specs, metrics=evaluation.preset.metrics)
        notes += [note for note in fitted.notes if note not in notes]
        shapes.setdefault(fitted.shape, fitted)
    return list(shapes.values())


def _measures(evaluation: Evaluation, shapes: Sequence[FittedShape]) -> Iterator[Measure]:
    preset = evaluation.preset
    everything = Measure(
        vaes={label: named.vae for label, named in evaluation.vaes.items()},
        metrics=preset.metrics,
        lpips=find_lpips(preset.backbone, averaging=preset.averaging).to(evaluation.device)
        if "lpips" in preset.metrics
        else None,
        i3d=find_i3d().to(evaluation.device) if "fvd" in preset.metrics else None,
        fvd_resize=preset.fvd_resize,
        posterior=evaluation.posterior,
        seed=evaluation.seed,
        device=evaluation.device,
    )
    for fitted in shapes:
        too_short = fitted.shape.frames < MIN_FRAMES
        metrics: list[Metric] = [metric for metric in preset.metrics if metric != "fvd" or not too_short]
        if not metrics:
            raise ConfigError(f"FVD needs {MIN_FRAMES} frames, got {fitted.shape.frames}")
        yield replace(everything, metrics=metrics)


def _motion_meter(evaluation: Evaluation, notes: list[str]) -> MotionMeter | None:
    wanted = evaluation.motion == "on" or evaluation.preset.motion_subset is not None
    if evaluation.motion == "off" and evaluation.preset.motion_subset is not None:
        raise ConfigError("--motion off: the preset chooses clips by motion; add --motion-subset 0 to take them all")
    if evaluation.motion == "off":
        return None
    try:
        return MotionMeter()
    except ConfigError as error:
        if wanted:
            raise
        notes.append(str(error))
        return None


def _even_in_motion(
    evaluation: Evaluation,
    reader: WindowReader,
    files: Sequence[ClipFile],
    fitted: FittedShape,
    meter: MotionMeter,
    notes: list[str],
    progress: Progress,
) -> frozenset[str]:
    """Clips of the preset's motion subset: a first pass over all, at the size at which motion is measured."""
    width, height = FLOW_SIZE
    small = FittedShape(ClipShape(max(2, fitted.shape.frames), (height, width)), 1, 1)
    scores: dict[str, float] = {}
    bar = progress.add_task("motion of every clip", total=None, windows=0)
    for window in reader.read(files, small):
        score = meter(window.frames_THWC)
        if score is not None and window.clip_key not in scores:
            scores[window.clip_key] = score
        progress.update(bar, advance=1, windows=len(scores))
    count = evaluation.preset.motion_subset
    assert count is not None
    chosen = choose_evenly(scores, count, seed=evaluation.seed)
    notes.append(f"{len(chosen)} of {len(scores)} clips, chosen to be even in motion; {count} were asked for")
    return chosen


# --- the windows of one shape -------------------------------------------------------------------------------------


class _Runner:
    """Runs shapes one after another."""

    def __init__(
        self,
        reader: WindowReader,
        files: Sequence[ClipFile],
        meter: MotionMeter | None,
        gallery: Gallery,
        compatibility: _Compatibility | None,
        progress: Progress,
    ) -> None:
        self._reader = reader
        self._files = files
        self._meter = meter
        self._gallery = gallery
        self._compatibility = compatibility
        self._progress = progress
        self.failures: list[Rejection] = []

    def run(self, fitted: FittedShape, measure: Measure, record: TextIO) -> ShapeTotals:
        """Every window of that shape into totals, the gallery and the record."""
        shape = fitted.shape
        positions = {label: group_positions(vae.spec, shape.frames) for label, vae in measure.vaes.items()}
        totals = ShapeTotals(shape, positions)
        bar = self._progress.add_task(str(shape), total=None, windows=0)
        for window in self._reader.read(self._files, fitted):
            motion = self._meter(window.frames_THWC) if self._meter is not None else None
            try:
                measured = measure(window)
                if self._compatibility is not None:
                    self._compatibility.look(measured, shape, motion, measure.device)
            except NonFinite as error:
                self.failures.append(_non_finite(window, error))
                continue
            totals.add(measured)
            self._gallery.add(measured, shape)
            write_window(record, shape, measured, motion)
            self._progress.update(bar, advance=1, windows=totals.windows)
        return totals


@dataclass(frozen=True, slots=True)
class _Compatibility:
    """Measures windows against the judge, writes a line for each and keeps some to be shown."""

    measure: CompatibilityMeasure
    file: TextIO
    strips: StripKeeper

    def look(self, measured: Measured, shape: ClipShape, motion: float | None, device: torch.device) -> None:
        """NonFinite if a decoder gives such numbers."""
        window = measured.window
        figures, shown = self.measure(window_pixels(window, device), measured.latents_BCTHW, window.key)
        write_line(self.file, shape, window, motion, figures)
        self.strips.add(shape, window.key, motion, window.frames_THWC, shown)


def _non_finite(window: SourceWindow, error: NonFinite) -> Rejection:
    return Rejection(
        key=window.key,
        shard_id="clips",
        scope="window",
        stage="evaluate",
        error_class=RejectionClass.NON_FINITE.value,
        message=str(error),
    )


def _progress(console: Console) -> Progress:
    columns = (SpinnerColumn(), TextColumn("{task.description}: {task.fields[windows]} windows"), TimeElapsedColumn())
    return Progress(*columns, console=console)


# --- after --------------------------------------------------------------------------------------------------------


def _by_motion(path: Path, shapes: Sequence[ClipShape], evaluation: Evaluation) -> list[dict[str, Any]]:
    """Figures by bucket of motion for each shape, from the record on disk: twice read, never held."""
    tables = []
    for shape in shapes:
        of_shape = _lines_of(path, shape)
        scores = [line["motion"] for line in of_shape() if line["motion"] is not None]
        edges = quantile_edges(scores, evaluation.motion_buckets)
        buckets = motion_table(of_shape(), edges)
        metrics = [metric for metric in evaluation.preset.metrics if metric != "fvd"]
        if buckets and metrics:
            tables.append({"shape": str(shape), "metrics": metrics, "buckets": buckets})
    return tables


def _lines_of(path: Path, shape: ClipShape) -> Callable[[], Iterator[dict[str, Any]]]:
    """Reads the lines of one shape, as often as it is called."""
    return lambda: (line for line in read_windows(path) if _is_of(line, shape))


def _is_of(line: dict[str, Any], shape: ClipShape) -> bool:
    if line["frames"] != shape.frames or line["own_size"] != (shape.size is None):
        return False
    return shape.size is None or tuple(line["size"]) == shape.size


def _notes_on_totals(totals: Sequence[ShapeTotals]) -> list[str]:
    notes = []
    for total in totals:
        count = total.source_features.count
        if 0 < count <= NUM_LOGITS:
            notes.append(
                f"{total.shape}: FVD of {count} windows. Few of them bias it upwards; papers take 2000 and more"
            )
    return notes


def _describe(evaluation: Evaluation, decoders: Sequence[str]) -> dict[str, Any]:
    """What was compared and how."""
    preset = evaluation.preset
    return {
        "preset": preset.name,
        "about": preset.about,
        "settings": {
            "metrics": list(preset.metrics),
            "frame_stride": preset.frame_stride,
            "windows_per_clip": evaluation.windows_per_clip,
            "limit": preset.limit,
            "motion_subset": preset.motion_subset,
            "lpips": {"backbone": preset.backbone, "averaging": preset.averaging},
            "fvd_resize": preset.fvd_resize,
            "posterior": evaluation.posterior,
            "device": evaluation.device.type,
            "seed": evaluation.seed,
            "decoders": list(decoders),
            "torch": str(torch.__version__),
        },
        "vaes": {
            label: {
                "spec": named.vae.spec.name,
                "family": named.vae.spec.family,
                "time_stride": named.vae.spec.time_stride,
                "space_stride": named.vae.spec.space_stride,
                "latent_channels": named.vae.spec.latent_channels,
                "dtype": str(named.vae.dtype).removeprefix("torch."),
                "weights_sha256": named.vae.weights_sha256,
                "seeded": named.is_seeded,
            }
            for label, named in evaluation.vaes.items()
        },
        "published": [{"method": row.method, "figures": row.figures} for row in preset.published],
    }


def _nothing_message(files: Sequence[ClipFile], failures: Sequence[Rejection]) -> str:
    shown = "".join(f"\n  {one.key}: {one.error_class}: {one.message}" for one in failures[:5])
    more = f"\n  and {len(failures) - 5} more" if len(failures) > 5 else ""
    return f"none of {len(files)} files could be evaluated:{shown}{more}"
