"""report.json and the kept windows as one HTML page that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from jobs.evaluation.charts import legend, line_chart
from jobs.evaluation.compatibility_page import StripKeeper, compatibility_html
from jobs.evaluation.examples import ERROR_GAIN, Example, Gallery
from jobs.evaluation.presets import LOWER_IS_BETTER, METRICS, Metric
from jobs.evaluation.report import best_label, measured_metrics, number_text, shape_of, span_text, windows_text
from jobs.web_page import bullets, figure, table, write_document

PAGE_NAME = "index.html"
BY_FRAME: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
"""Those that a frame has on its own: in charts and under pictures."""


def write_page(report: dict[str, Any], gallery: Gallery, strips: StripKeeper, folder: Path) -> Path:
    """index.html, whole or not at all."""
    return write_document(folder / PAGE_NAME, f"VAEs compared: {report['preset']}", _body(report, gallery, strips))


def _body(report: dict[str, Any], gallery: Gallery, strips: StripKeeper) -> Iterator[str]:
    yield f"<h1>VAEs compared: {escape(report['preset'])}</h1><p>{escape(report['about'])}</p>"
    yield _vae_table(report)
    if report["notes"]:
        yield bullets(report["notes"])
    for result in report["results"]:
        yield f"<h2>{escape(str(shape_of(result)))}: {windows_text(result['windows'])}</h2>"
        yield _means_table(result)
        yield _charts(result)
    for motion in report["motion"]:
        yield _motion(motion)
    if "compatibility" in report:
        yield from compatibility_html(report["compatibility"], strips)
    yield from _examples(gallery)
    if report["published"]:
        yield "<h2>Published under this protocol</h2>"
        yield "<p>By the papers, on their data: beside your own figures only if the clips are those.</p>"
        yield _published_table(report["published"])
    if report["failures"]:
        yield f"<h2>Not evaluated: {len(report['failures'])}</h2>"
        yield bullets([f"{each['key']}: {each['error_class']}: {each['message']}" for each in report["failures"]])


def _vae_table(report: dict[str, Any]) -> str:
    head = ("VAE", "spec", "compression (t x h x w)", "latent channels", "weights")
    rows = []
    for label, vae in report["vaes"].items():
        stride = vae["space_stride"]
        weights = "random (seeded)" if vae["seeded"] else str(vae["weights_sha256"])[:12]
        compression = f"{vae['time_stride']} x {stride} x {stride}"
        rows.append((label, vae["spec"], compression, str(vae["latent_channels"]), weights))
    return table(head, [[escape(cell) for cell in row] for row in rows])


def _means_table(result: dict[str, Any]) -> str:
    metrics = measured_metrics(result)
    head = ["VAE", *(f"{METRICS[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}" for metric in metrics)]
    vaes: dict[str, dict[str, Any]] = {label: of["metrics"] for label, of in result["vaes"].items()}
    best = {m: best_label(m, {label: of.get(m, {}).get("mean") for label, of in vaes.items()}) for m in metrics}
    rows = [
        [escape(label), *(_mean_cell(metric, of.get(metric, {}), best[metric] == label) for metric in metrics)]
        for label, of in vaes.items()
    ]
    return table(head, rows) + "<p>± is the standard error of the mean over windows.</p>"


def _mean_cell(metric: Metric, figure: dict[str, Any], is_best: bool) -> str:
    text = number_text(metric, figure.get("mean"))
    if figure.get("standard_error") is not None:
        text += f" <small>±{number_text(metric, figure['standard_error'])}</small>"
    return f"\0{text}" if is_best else text  # \0 marks the best cell for table


def _charts(result: dict[str, Any]) -> str:
    """Quality by position in a group of frames, and by frame of the window, where seams of tiles show."""
    charts = []
    for metric in BY_FRAME:
        of_vaes = {label: of for label, of in result["vaes"].items() if metric in of["by_frame"]}
        if not of_vaes or result["shape"]["frames"] == 1:
            continue
        decimals = 2 if metric == "psnr" else 4
        name = "PSNR (dB)" if metric == "psnr" else METRICS[metric]
        positions = sorted({int(p) for of in of_vaes.values() for p in of["by_position"].get(metric, {})})
        if len(positions) > 1:
            groups = {
                label: [of["by_position"][metric].get(str(p)) for p in positions] for label, of in of_vaes.items()
            }
            ticks = [str(position) for position in positions]
            title = "position in a group of frames"
            charts.append(
                (f"{name} within a group", line_chart(groups, ticks, x_title=title, y_title=name, decimals=decimals))
            )
        frames = {label: of["by_frame"][metric] for label, of in of_vaes.items()}
        ticks = [str(number) for number in range(result["shape"]["frames"])]
        charts.append(
            (
                f"{name} by frame",
                line_chart(frames, ticks, x_title="frame of the window", y_title=name, decimals=decimals),
            )
        )
    if not charts:
        return ""
    boxes = "".join(f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts)
    return f'{legend(list(result["vaes"]))}<div class="charts">{boxes}</div>'


def _motion(motion: dict[str, Any]) -> str:
    buckets = motion["buckets"]
    labels = list(dict.fromkeys(label for bucket in buckets for label in bucket["vaes"]))
    ticks = [span_text(bucket) for bucket in buckets]
    flow = "Mean optical flow (DIS) in pixels a frame at 768 x 432, and windows in brackets."
    text = f'<h2>By motion: {escape(motion["shape"])}</h2><p>{flow}</p><div class="charts">'
    for metric in motion["metrics"]:
        series = {
            label: [bucket["vaes"].get(label, {}).get(metric, {}).get("mean") for bucket in buckets]
            for label in labels
        }
        head = ["VAE", *(f"{tick} ({bucket['windows']})" for tick, bucket in zip(ticks, buckets, strict=True))]
        rows = [[escape(label), *(number_text(metric, v) for v in values)] for label, values in series.items()]
        text += f"<div><h3>{escape(METRICS[metric])}</h3>{table(head, rows)}</div>"
    return text + "</div>"


def _examples(gallery: Gallery) -> Iterator[str]:
    worst = gallery.worst()
    if any(examples for _, _, examples in worst):
        yield "<h2>Worst clips</h2>"
        yield f"<p>Animated at a fixed rate, made small. Errors: |difference| x {ERROR_GAIN} at the worst frame.</p>"
    for shape, label, examples in worst:
        if examples:
            yield f"<h3>{escape(label)}, {escape(str(shape))}</h3>"
            yield from (_example(example, first=label) for example in examples)
    first = gallery.first()
    if first:
        yield "<h2>Other clips</h2>"
        yield from (_example(example, first=None) for example in first)


def _example(example: Example, *, first: str | None) -> str:
    """Source, then each VAE, `first` before the others; its error after it."""
    labels = sorted(example.decoded, key=lambda label: label != first)
    figures = [figure(example.source, f"source: {example.key}")]
    for label in labels:
        values = example.values[label]
        shown = ", ".join(f"{m} {number_text(m, values[m])}" for m in BY_FRAME if m in values)
        figures.append(figure(example.decoded[label], f"{label}: {shown}"))
    for label in labels[:1] if first is not None else []:
        figures.append(figure(example.errors[label], f"error of {label}, frame {example.worst_frame[label]}"))
    return f'<div class="strip">{"".join(figures)}</div>'


def _published_table(published: list[dict[str, Any]]) -> str:
    metrics: list[Metric] = [metric for metric in METRICS if any(metric in row["figures"] for row in published)]
    rows = [
        [escape(row["method"]), *(number_text(metric, row["figures"].get(metric)) for metric in metrics)]
        for row in published
    ]
    return table(["method", *(METRICS[metric] for metric in metrics)], rows)
