"""Variants side by side: their evaluation as rows of one table, in Markdown, JSON and on the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from jobs.ablation.config import AblationConfig
from jobs.ablation.runs import VariantRun, failures
from jobs.evaluation.presets import LOWER_IS_BETTER
from jobs.evaluation.report import measured_metrics, number_text, shape_of, span_text, windows_text

TABLE_NAME, JSON_NAME = "table.md", "table.json"
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class AblationTable:
    """Columns by name; a row for each variant, finished or not."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def cells(self, row: Row) -> list[str]:
        return [_text(row.get(column)) for column in self.columns]

    def markdown(self) -> str:
        lines = [f"# {self.title}", "", _markdown_row(self.columns), _markdown_row(["---"] * len(self.columns))]
        lines += [_markdown_row(self.cells(row)) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"

    def show(self, console: Console) -> None:
        table = Table(title=self.title, title_justify="left")
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*self.cells(row))
        console.print(table)
        for note in self.notes:
            console.print(f"[yellow]note:[/] {note}", soft_wrap=True)

    def write(self, folder: Path, about: dict[str, Any]) -> Path:
        """table.json and table.md; the path of the latter."""
        folder.mkdir(parents=True, exist_ok=True)
        document = about | {"columns": list(self.columns), "rows": list(self.rows), "notes": list(self.notes)}
        (folder / JSON_NAME).write_text(
            json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
        (folder / TABLE_NAME).write_text(self.markdown(), encoding="utf-8")
        return folder / TABLE_NAME


def make_table(
    config: AblationConfig,
    runs: Sequence[VariantRun],
    parameters: Mapping[str, int],
    report: dict[str, Any] | None,
) -> AblationTable:
    """`report` is the evaluation's of the variants that are there, None if none is; `parameters` counts theirs."""
    rows = [_row(config, run, parameters, report) for run in runs]
    columns = list(dict.fromkeys(column for row in rows for column in row if column != "failure"))
    last = config.published_as
    if last in columns:  # beside what came out
        columns.remove(last)
        columns.append(last)
    notes = [*failures(list(runs)), *(report["notes"] if report else [])]
    if report:
        (result,) = report["results"]
        notes.insert(0, f"{shape_of(result)}: {windows_text(result['windows'])}, the same for all variants")
    return AblationTable(config.about or config.name, tuple(columns), tuple(rows), tuple(notes))


def _row(
    config: AblationConfig, run: VariantRun, parameters: Mapping[str, int], report: dict[str, Any] | None
) -> Row:
    row: Row = {"variant": run.name}
    if run.failure is not None or report is None:
        row["failure"] = run.failure
    else:
        row["parameters"] = parameters[run.name]
        row["steps"] = run.settings.loop.steps
        row |= _means(report, run.name) | _by_motion(report, run.name) | _compatibility(report, run.name)
    if run.name in config.published:
        row[config.published_as] = config.published[run.name]
    return row


def _means(report: dict[str, Any], variant: str) -> Row:
    (result,) = report["results"]
    metrics = result["vaes"][variant]["metrics"]
    arrows = {metric: f"{metric} {'↓' if metric in LOWER_IS_BETTER else '↑'}" for metric in measured_metrics(result)}
    return {name: _rounded(metric, metrics[metric]["mean"]) for metric, name in arrows.items() if metric in metrics}


def _by_motion(report: dict[str, Any], variant: str) -> Row:
    """The first metric in the stillest and the most moving bucket."""
    if not report["motion"]:
        return {}
    (motion,) = report["motion"]
    buckets, metric = motion["buckets"], motion["metrics"][0]
    if len(buckets) < 2:
        return {}
    return {
        f"{metric}, motion {span_text(bucket)}": _rounded(
            metric, bucket["vaes"].get(variant, {}).get(metric, {}).get("mean")
        )
        for bucket in (buckets[0], buckets[-1])
    }


def _compatibility(report: dict[str, Any], variant: str) -> Row:
    section = report.get("compatibility")
    if section is None:
        return {}
    everything = section["results"][0]["buckets"][0]["vaes"].get(variant)
    if everything is None:  # its latents have another shape: a note says so
        return {}
    mapping = section["default_mapping"]
    read, written = (everything[decoder][mapping] for decoder in ("image_decoder", "video_decoder"))
    latents = everything["latents"]
    return {
        f"image decoder, psnr ({mapping}) ↑": _rounded("psnr", read["psnr"]["mean"]),
        "dB below the image VAE ↓": _rounded("psnr", read["below_ceiling"]["mean"]),
        "image latents decoded, psnr ↑": _rounded("psnr", written["psnr"]["mean"]),
        "cosine ↑": _rounded("cosine", latents["cosine"]["mean"]),
        "Frechet ↓": None if latents["frechet"] is None else float(f"{latents['frechet']:.3g}"),
    }


def _rounded(metric: str, value: float | None) -> float | None:
    return None if value is None else float(number_text(metric, value))


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
