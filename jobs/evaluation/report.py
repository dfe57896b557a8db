"""What an evaluation says: a table on the terminal and report.json. Neither has a time or a host in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.evaluation.presets import LOWER_IS_BETTER, METRICS, ClipShape, Metric

REPORT_NAME = "report.json"
_DECIMALS: dict[str, int] = {"psnr": 2, "psnr_video": 2, "fvd": 2}


def number_text(metric: str, value: float | None) -> str:
    """A figure with the decimals that papers give it."""
    return "-" if value is None else f"{value:.{_DECIMALS.get(metric, 4)}f}"


def shape_of(result: dict[str, Any]) -> ClipShape:
    """The shape of one entry of report["results"]."""
    size = result["shape"]["size"]
    return ClipShape(result["shape"]["frames"], tuple(size) if size else None)


def measured_metrics(result: dict[str, Any]) -> list[Metric]:
    """Those of one entry of report["results"], in the order of METRICS."""
    present = {metric for of_vae in result["vaes"].values() for metric in of_vae["metrics"]}
    return [metric for metric in METRICS if metric in present]


def best_label(metric: Metric, means: dict[str, float | None]) -> str | None:
    """The label of the best figure; None with fewer than two to compare."""
    known = {label: mean for label, mean in means.items() if mean is not None}
    if len(known) < 2:
        return None
    return (min if metric in LOWER_IS_BETTER else max)(known, key=lambda label: known[label])


def write_report(report: dict[str, Any], folder: Path) -> Path:
    """report.json, whole or not at all."""
    part = folder / f".{REPORT_NAME}.{os.getpid()}"
    part.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return part.replace(folder / REPORT_NAME)


def print_report(report: dict[str, Any], console: Console) -> None:
    """Tables per shape: means, by position in a group, by motion; then what is missing."""
    for result in report["results"]:
        console.print(_means_table(result))
        positions = _positions_table(result)
        if positions is not None:
            console.print(positions)
    for motion in report["motion"]:
        console.print(_motion_table(motion))
    for note in report["notes"]:
        console.print(f"[yellow]note:[/] {note}", soft_wrap=True)
    for failure in report["failures"]:
        console.print(
            f"[yellow]not evaluated:[/] {failure['key']}: {failure['error_class']}: {failure['message']}",
            soft_wrap=True,
        )


def _means_table(result: dict[str, Any]) -> Table:
    metrics = measured_metrics(result)
    table = Table(title=f"{shape_of(result)}: {windows_text(result['windows'])}", title_justify="left")
    table.add_column("VAE", overflow="fold")
    for metric in metrics:
        table.add_column(f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}", justify="right")
    best = {
        metric: best_label(
            metric, {label: of["metrics"].get(metric, {}).get("mean") for label, of in result["vaes"].items()}
        )
        for metric in metrics
    }
    for label, of_vae in result["vaes"].items():
        cells = []
        for metric in metrics:
            figure = of_vae["metrics"].get(metric, {})
            text = number_text(metric, figure.get("mean"))
            if figure.get("standard_error") is not None:
                text += f" ±{number_text(metric, figure['standard_error'])}"
            cells.append(f"[bold]{text}[/]" if best[metric] == label else text)
        table.add_row(label, *cells)
    return table


def _positions_table(result: dict[str, Any]) -> Table | None:
    """SSIM, or else PSNR, by position in a group."""
    metric = next(
        (m for m in ("ssim", "psnr") if all(m in of["by_position"] for of in result["vaes"].values())), None
    )
    if metric is None:
        return None
    by_vae = {label: of["by_position"][metric] for label, of in result["vaes"].items()}
    positions = sorted({int(position) for each in by_vae.values() for position in each})
    if len(positions) < 2:
        return None
    table = Table(title=f"{metric} by position in a group of frames", title_justify="left")
    table.add_column("VAE", overflow="fold")
    for position in positions:
        table.add_column(str(position), justify="right")
    table.add_column("range", justify="right")
    for label, each in by_vae.items():
        cells = [number_text(metric, each.get(str(position))) for position in positions]
        spread = max(each.values()) - min(each.values()) if each else None
        table.add_row(label, *cells, number_text(metric, spread))
    return table


def _motion_table(motion: dict[str, Any]) -> Table:
    metric = "psnr" if "psnr" in motion["metrics"] else motion["metrics"][0]
    title = f"{metric} by motion (pixels a frame at 768 x 432), {motion['shape']}"
    table = Table(title=title, title_justify="left")
    table.add_column("VAE", overflow="fold")
    for bucket in motion["buckets"]:
        table.add_column(f"{span_text(bucket)}\n{windows_text(bucket['windows'])}", justify="right")
    labels = list(dict.fromkeys(label for bucket in motion["buckets"] for label in bucket["vaes"]))
    for label in labels:
        cells = (bucket["vaes"][label].get(metric, {}).get("mean") for bucket in motion["buckets"])
        table.add_row(label, *(number_text(metric, cell) for cell in cells))
    return table


def windows_text(count: int) -> str:
    """ "1 window", "7 windows"."""
    return f"{count} window" + ("" if count == 1 else "s")


def span_text(bucket: dict[str, Any]) -> str:
    """ "0.52 to 1.30", of a bucket of motion."""
    low, high = (None if edge is None else f"{edge:.2f}" for edge in (bucket["from"], bucket["to"]))
    if low is None and high is None:
        return "all"
    return f"below {high}" if low is None else f"{low} and more" if high is None else f"{low} to {high}"
