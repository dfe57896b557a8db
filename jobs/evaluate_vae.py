"""Compare video VAEs on your own clips: what they give back of them, in figures and side by side.

    python jobs/evaluate_vae.py --vae hf://AILab-CVC/CV-VAE/vae3d_v1-1 --vae iv=ivvae_z16_dim64.pth \\
        --clips 's3://bucket/validation/*.mp4' --preset cvvae-webvid --output data/evaluation
    python jobs/evaluate_vae.py --vae cvvae-sd21-tiny --vae ivvae-z4-tiny --clips data/demo/clips --output data/try \\
        --size 96x160
    python jobs/evaluate_vae.py --vae cv=data/runs/tiny-cvvae/export --vae floor=data/runs/tiny-cvvae-plain/export \\
        --image-vae image=data/runs/tiny-image-vae/export --clips data/train/held_out --output data/compatibility

Writes OUTPUT/index.html (one page that needs nothing beside it), OUTPUT/report.json and OUTPUT/windows.jsonl, a line
per window with every figure. All VAEs see the same windows: of a length and size that each of them takes. Clips that
fail are named in the report. The same command gives the same bytes. `latents evaluate` is this same function.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
import typer
from rich.console import Console

from cvvae.image_vae_checkpoint import load_image_vae
from cvvae.weights import CONFIG_NAME
from jobs.config import vae_named
from jobs.evaluation.compatibility import Judge
from jobs.evaluation.compatibility_tables import print_compatibility
from jobs.evaluation.page import write_page
from jobs.evaluation.presets import METRICS, PRESETS, ClipShape, Metric, Preset
from jobs.evaluation.report import REPORT_NAME, print_report, write_report
from jobs.evaluation.run import Evaluation, NamedVAE, run_evaluation
from jobs.messages import report_errors
from pipeline.checkpoints import fetch_checkpoint, load_source
from pipeline.errors import ConfigError
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.policies import DTypeName

_LABEL = re.compile(r"[\w.+ -]+")


@dataclass(frozen=True, slots=True)
class _Overrides:
    """What the command line says against the preset; None leaves it."""

    metrics: list[str] | None
    frames: list[int] | None
    sizes: list[str] | None
    frame_stride: int | None
    limit: int | None
    motion_subset: int | None


def evaluate(
    vae: Annotated[list[str], typer.Option(help="A checkpoint (path or URL) or a named spec, as LABEL=... or bare.")],
    clips: Annotated[list[str], typer.Option(help="Files, folders, globs or URLs of videos, images or tars.")],
    output: Annotated[Path, typer.Option(help="Folder for the page, the report and the figures of each window.")],
    preset: Annotated[str, typer.Option(help=f"A protocol: {', '.join(PRESETS)}.")] = "plain",
    metric: Annotated[list[str] | None, typer.Option(help=f"Instead of the preset's: {', '.join(METRICS)}.")] = None,
    frames: Annotated[list[int] | None, typer.Option(min=1, help="Instead of the preset's lengths.")] = None,
    size: Annotated[list[str] | None, typer.Option(help="HEIGHTxWIDTH, or own: instead of the preset's.")] = None,
    frame_stride: Annotated[int | None, typer.Option(min=1, help="Every n-th frame.")] = None,
    windows_per_clip: Annotated[int, typer.Option(min=1, help="Windows from a clip's start on.")] = 1,
    limit: Annotated[int | None, typer.Option(min=0, help="So many clips at random; 0: all.")] = None,
    motion: Annotated[Literal["auto", "on", "off"], typer.Option(help="Motion scores; auto: if OpenCV is there.")] = (
        "auto"
    ),
    motion_subset: Annotated[int | None, typer.Option(min=0, help="So many clips, even in motion; 0: all.")] = None,
    motion_buckets: Annotated[int, typer.Option(min=1)] = 4,
    posterior: Annotated[Literal["mode", "sample"], typer.Option(help="What is decoded.")] = "mode",
    dtype: Annotated[DTypeName, typer.Option(help="Of the VAEs; metrics are in float32 and float64.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of what is random: the choice of clips, samples, specs.")] = 0,
    decode_children: Annotated[int, typer.Option(min=1, help="Processes that decode.")] = 2,
    image_vae: Annotated[
        str | None,
        typer.Option(help="Whose latents theirs should be: an LDM file or a diffusers folder."),
    ] = None,
) -> None:
    """Compare VAEs on your own clips: figures, a page side by side, the worst clips."""
    console = Console(highlight=False)
    with report_errors():
        overrides = _Overrides(metric, frames, size, frame_stride, limit, motion_subset)
        chosen = apply_overrides(find_preset(preset), overrides)
        target = open_device(device)
        vaes = load_vaes(vae, seed=seed, dtype=TORCH_DTYPES[dtype], device=target)
        evaluation = Evaluation(
            preset=chosen,
            vaes=vaes,
            clips=tuple(clips),
            windows_per_clip=windows_per_clip,
            motion=motion,
            motion_buckets=motion_buckets,
            posterior=posterior,
            device=target,
            seed=seed,
            decode_children=decode_children,
            judge=load_judge(image_vae, target) if image_vae else None,
        )
        output.mkdir(parents=True, exist_ok=True)
        report, pictures = run_evaluation(evaluation, output, console)
        write_report(report, output)
        page = write_page(report, pictures.gallery, pictures.strips, output)
        print_report(report, console)
        if "compatibility" in report:
            print_compatibility(report["compatibility"], console)
        console.print(f"{page}\n{output / REPORT_NAME}", soft_wrap=True)


def find_preset(name: str) -> Preset:
    """ConfigError names those there are."""
    if name not in PRESETS:
        raise ConfigError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]


def apply_overrides(preset: Preset, given: _Overrides) -> Preset:
    """The preset with what the command line says. Another shape or stride is another protocol: its published figures
    are dropped, as the name says then. ConfigError for a metric or size that there is not."""
    unknown = sorted(set(given.metrics or ()) - set(get_args(Metric)))
    if unknown:
        raise ConfigError(f"--metric: expected of {', '.join(METRICS)}, got {', '.join(unknown)}")
    lengths = sorted(set(given.frames or (shape.frames for shape in preset.shapes)))
    sizes = (
        [parse_size(text) for text in given.sizes] if given.sizes else dict.fromkeys(s.size for s in preset.shapes)
    )
    changed = replace(
        preset,
        shapes=tuple(ClipShape(length, size) for size in sizes for length in lengths),
        frame_stride=given.frame_stride or preset.frame_stride,
        metrics=tuple(metric for metric in METRICS if metric in (given.metrics or preset.metrics)),
        limit=preset.limit if given.limit is None else given.limit or None,
        motion_subset=preset.motion_subset if given.motion_subset is None else given.motion_subset or None,
    )
    if changed.shapes != preset.shapes or changed.frame_stride != preset.frame_stride:
        shapes = "; ".join(map(str, changed.shapes))
        about = f"as {preset.name}, but with {shapes}" + (
            f", every {changed.frame_stride}th frame" if changed.frame_stride > 1 else ""
        )
        changed = replace(changed, name=f"{preset.name}, changed", about=about, published=())
    return changed


def parse_size(text: str) -> tuple[int, int] | None:
    """ "480x848" -> (480, 848), "own" -> None. ConfigError."""
    if text == "own":
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ConfigError(f"--size: expected HEIGHTxWIDTH such as 480x848, or own, got {text!r}")
    return int(match[1]), int(match[2])


def open_device(name: str) -> torch.device:
    """ConfigError if torch does not know it or it is not here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch without CUDA
        raise ConfigError(f"--device: {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def load_vaes(texts: Sequence[str], *, seed: int, dtype: torch.dtype, device: torch.device) -> dict[str, NamedVAE]:
    """By label, in the order given. ConfigError for a checkpoint that cannot be loaded, or a label given twice."""
    loaded: dict[str, NamedVAE] = {}
    for text in texts:
        label, where = split_label(text)
        source = vae_named(where, seed=seed)
        if label in loaded:
            raise ConfigError(f"--vae: {label!r} twice; name them apart: --vae LABEL={where}")
        vae = load_source(source).to(device=device, dtype=dtype).requires_grad_(False)
        loaded[label] = NamedVAE(vae, is_seeded=source.is_seeded)
    return loaded


def load_judge(text: str, device: torch.device) -> Judge:
    """An image VAE in float32. ConfigError if it cannot be loaded.

    A file without a config states no scale: it is then 1, which shows in the latents' distances and nowhere else.
    """
    label, where = split_label(text)
    path = fetch_checkpoint(where)
    try:
        loaded = load_image_vae(path, scaling_factor=None if (path / CONFIG_NAME).is_file() else 1.0)
    except (ValueError, OSError) as error:
        raise ConfigError(f"--image-vae {where}: {error}") from error
    return Judge(
        label, loaded.vae.to(device), loaded.scaling_factor, loaded.shift_factor, weights_sha256=loaded.weights_sha256
    )


def split_label(text: str) -> tuple[str, str]:
    """ "iv=weights/iv.pth" -> ("iv", "weights/iv.pth"); without a label the last part of the path is one."""
    label, equals, where = text.partition("=")
    if equals and _LABEL.fullmatch(label) and where:
        return label, where
    return text.rstrip("/").rpartition("/")[2], text


def read_report(folder: Path) -> dict[str, Any]:
    """An earlier evaluation's report.json."""
    return json.loads((folder / REPORT_NAME).read_text(encoding="utf-8"))


if __name__ == "__main__":
    typer.run(evaluate)
