"""Lines of compatibility figures into tables: over all windows, and by bucket of motion."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from cvvae.compatibility import LatentComparison, channel_std, gaussian_mmd, median_distance
from jobs.evaluation.compatibility import COMPARED, DEFAULT_MAPPING, Judge
from jobs.evaluation.motion import quantile_edges
from jobs.evaluation.presets import ClipShape
from jobs.evaluation.report import span_text, windows_text
from jobs.evaluation.totals import RunningMean

MAX_PAIRS = 2048
"""Pairs of latents in one kernel distance; evenly spaced ones where there are more. Memory is its square."""
KERNEL = (
    "squared MMD, Gaussian kernel exp(-d^2 / (2 s^2)), s the median distance of the two sets together, unbiased over "
    f"at most {MAX_PAIRS} pairs of positions"
)
Lines = Callable[[], Iterable[dict[str, Any]]]
"""The lines again and again."""


def compatibility_section(judge: Judge, shapes: Mapping[ClipShape, Lines], motion_buckets: int) -> dict[str, Any]:
    """report["compatibility"]: what was compared, and for each shape all windows, then buckets of motion."""
    return {
        "image_vae": {
            "label": judge.label,
            "weights_sha256": judge.weights_sha256,
            "latent_channels": judge.vae.latent_channels,
            "scaling_factor": judge.scaling_factor,
            "shift_factor": judge.shift_factor,
        },
        "mappings": dict(COMPARED),
        "default_mapping": DEFAULT_MAPPING,
        "kernel": KERNEL,
        "results": [
            {"shape": str(shape), "buckets": _buckets(lines, motion_buckets)} for shape, lines in shapes.items()
        ],
    }


def _buckets(lines: Lines, motion_buckets: int) -> list[dict[str, Any]]:
    """First all windows, without edges; then by motion where there are scores of more than one bucket."""
    edges = quantile_edges([line["motion"] for line in lines() if line["motion"] is not None], motion_buckets)
    everything, by_motion = _Totals(), [_Totals() for _ in range(len(edges) + 1)]
    for line in lines():
        everything.add(line["vaes"])
        if edges and line["motion"] is not None:
            by_motion[int(np.searchsorted(edges, line["motion"], side="right"))].add(line["vaes"])
    spans = zip([None, *edges], [*edges, None], strict=True)
    rows = [(None, None, everything), *((low, high, of) for (low, high), of in zip(spans, by_motion, strict=True))]
    return [{"from": low, "to": high, **totals.to_json()} for low, high, totals in rows if totals.windows]


@dataclass(slots=True)
class _OfVAE:
    decoders: dict[str, dict[str, dict[str, RunningMean]]] = field(default_factory=dict)
    """Which decoder -> mapping -> figure."""
    comparison: LatentComparison | None = None
    pairs: tuple[list[list[float]], list[list[float]]] = field(default_factory=lambda: ([], []))
    cosine: RunningMean = field(default_factory=RunningMean)
    """Of windows: for its standard error."""

    def add(self, figures: dict[str, Any]) -> None:
        for decoder in ("image_decoder", "video_decoder"):
            for mapping, values in figures[decoder].items():
                means = self.decoders.setdefault(decoder, {}).setdefault(mapping, {})
                for name, value in values.items():
                    means.setdefault(name, RunningMean()).add(value)
        latents = figures["latents"]
        one = LatentComparison.from_json(latents["comparison"])
        if self.comparison is None:
            self.comparison = LatentComparison.empty(len(one.found.mean_D))
        self.comparison.merge(one)
        self.cosine.add(one.cosine)
        for kept, new in zip(self.pairs, (latents["pairs"]["found"], latents["pairs"]["reference"]), strict=True):
            kept += new

    def to_json(self) -> dict[str, Any]:
        summary: dict[str, Any] = {
            decoder: {m: {name: mean.to_json() for name, mean in of.items()} for m, of in mappings.items()}
            for decoder, mappings in self.decoders.items()
        }
        psnr = {m: of["psnr"]["mean"] for m, of in summary["image_decoder"].items()}
        summary["best_mapping"] = max(psnr, key=lambda mapping: psnr[mapping])
        return summary | {"latents": self._distances()}

    def _distances(self) -> dict[str, Any]:
        assert self.comparison is not None, "asked for after a window"
        found_ND, reference_ND = (torch.tensor(side, dtype=torch.float64) for side in self.pairs)
        step = -(-len(found_ND) // MAX_PAIRS)
        found_ND, reference_ND = found_ND[::step], reference_ND[::step]
        bandwidth = median_distance(found_ND, reference_ND)
        comparison = self.comparison
        several = comparison.found.count > 1
        return {
            "relative_rms": comparison.relative_rms,
            "cosine": self.cosine.to_json() | {"mean": comparison.cosine},
            "frechet": comparison.frechet if several else None,
            "mmd": gaussian_mmd(found_ND, reference_ND, bandwidth) if len(found_ND) > 1 else None,
            "mmd_bandwidth": bandwidth,
            "mmd_pairs": len(found_ND),
            "channels": {
                side: {
                    "mean": statistics.mean_D.tolist(),
                    "std": channel_std(statistics).tolist() if several else None,
                }
                for side, statistics in (("video", comparison.found), ("image", comparison.reference))
            },
        }


class _Totals:
    def __init__(self) -> None:
        self.windows = 0
        self._vaes: dict[str, _OfVAE] = {}

    def add(self, vaes: dict[str, Any]) -> None:
        self.windows += 1
        for label, figures in vaes.items():
            self._vaes.setdefault(label, _OfVAE()).add(figures)

    def to_json(self) -> dict[str, Any]:
        return {"windows": self.windows, "vaes": {label: of.to_json() for label, of in self._vaes.items()}}


# --- as tables ------------------------------------------------------------------------------------------------------

TableText = tuple[str, list[str], list[list[str]]]
"""Title, head, rows of cells: for the terminal and the page alike."""


def tables_of(section: dict[str, Any]) -> Iterator[TableText]:
    """Every table of report["compatibility"]."""
    judge = section["image_vae"]["label"]
    for result in section["results"]:
        for bucket in result["buckets"]:
            where = f"{result['shape']}, {_bucket_text(bucket)}"
            yield f"{judge} decodes video latents: {where}", *_image_decoder(bucket, judge)
            yield f"the VAEs decode latents of {judge}: {where}", *_video_decoder(bucket, judge)
            yield f"latents against those of {judge}: {where}", *_latents(bucket)
        yield f"latents by channel, mean and std: {result['shape']}", *_channels(result["buckets"][0], judge)


def _bucket_text(bucket: dict[str, Any]) -> str:
    count = windows_text(bucket["windows"])
    if bucket["from"] is None and bucket["to"] is None:
        return count
    return f"motion {span_text(bucket)} ({count})"


def _image_decoder(bucket: dict[str, Any], judge: str) -> tuple[list[str], list[list[str]]]:
    head = ["VAE", "compared frames", "PSNR ↑", "SSIM ↑", f"{judge} itself", "dB below it ↓"]
    return head, list(_decoder_rows(bucket, "image_decoder", "below_ceiling"))


def _video_decoder(bucket: dict[str, Any], judge: str) -> tuple[list[str], list[list[str]]]:
    head = ["VAE", "latents of", "PSNR ↑", "SSIM ↑", f"{judge}, every frame", "PSNR between ↑"]
    return head, list(_decoder_rows(bucket, "video_decoder", "between_psnr"))


def _decoder_rows(bucket: dict[str, Any], decoder: str, last: str) -> Iterator[list[str]]:
    for label, of_vae in bucket["vaes"].items():
        for mapping, values in of_vae[decoder].items():
            best = " (best)" if decoder == "image_decoder" and mapping == of_vae["best_mapping"] else ""
            cells = [_mean(values, name, digits) for name, digits in (("psnr", 2), ("ssim", 4))]
            yield [label, mapping + best, *cells, _mean(values, "ceiling_psnr", 2), _mean(values, last, 2)]


def _latents(bucket: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    head = ["VAE", "cosine ↑", "relative RMS ↓", "Frechet ↓", "MMD² ↓"]
    rows = []
    for label, of_vae in bucket["vaes"].items():
        found = of_vae["latents"]
        cells = ["-" if found[name] is None else f"{found[name]:.3g}" for name in ("frechet", "mmd")]
        rows.append([label, _mean(found, "cosine", 4), _number(found["relative_rms"], 4), *cells])
    return head, rows


def _channels(bucket: dict[str, Any], judge: str) -> tuple[list[str], list[list[str]]]:
    first = next(iter(bucket["vaes"].values()))["latents"]["channels"]
    head = ["latents of", *(str(number) for number in range(len(first["image"]["mean"])))]
    rows = [[judge, *_moments(first["image"])]]
    rows += [[label, *_moments(of["latents"]["channels"]["video"])] for label, of in bucket["vaes"].items()]
    return head, rows


def _moments(channels: dict[str, Any]) -> list[str]:
    stds = channels["std"] or [None] * len(channels["mean"])
    return [f"{mean:+.2f}, {_number(std, 2)}" for mean, std in zip(channels["mean"], stds, strict=True)]


def _mean(values: dict[str, Any], name: str, digits: int) -> str:
    return _number(values[name]["mean"], digits) if name in values else "-"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def print_compatibility(section: dict[str, Any], console: Console) -> None:
    """Every table, on the terminal."""
    for title, head, rows in tables_of(section):
        table = Table(title=title, title_justify="left")
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
