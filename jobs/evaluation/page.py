"""report.json and the kept windows as one HTML page that needs nothing beside it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from jobs.evaluation.charts import legend, line_chart
from jobs.evaluation.compatibility_page import StripKeeper, compatibility_html
from jobs.evaluation.examples import ERROR_GAIN, Example, Gallery
from jobs.evaluation.presets import LOWER_IS_BETTER, METRICS, Metric
from jobs.evaluation.report import best_label, measured_metrics, number_text, shape_of, span_text, windows_text

PAGE_NAME = "index.html"
BY_FRAME: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
"""Those that a frame has on its own: in charts and under pictures."""
_STYLE = """
:root{color-scheme:light dark;--ground:#fcfcfb;--text:#1b1d21;--soft:#5c636e;--line:#dfe1e5;--best:#e8f0fb;
--series-0:#2f6fd0;--series-1:#d2601a;--series-2:#1d8a5b;--series-3:#a04bb0;--series-4:#9a7b00;--series-5:#c43d5c}
@media (prefers-color-scheme:dark){:root{--ground:#16181c;--text:#e9eaec;--soft:#a2a9b3;--line:#363b43;
--best:#1f3150;--series-0:#6aa5f5;--series-1:#f2935a;--series-2:#4fc08d;--series-3:#cf8add;--series-4:#d1b23c;
--series-5:#f07f99}}
body{margin:0 auto;max-width:78rem;padding:1.5rem;background:var(--ground);color:var(--text);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.5rem;margin:0}h2{font-size:1.2rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
p,.soft{color:var(--soft);margin:.3rem 0}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left}th{font-weight:600}td.best{background:var(--best);font-weight:600}
td small{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(26rem,100%),1fr));gap:1rem 2rem}
.chart{width:100%;height:auto}.chart text{font-size:11px;fill:var(--soft)}.grid{stroke:var(--line)}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.2rem;margin:.2rem 0;padding:0}
.legend svg{width:24px;height:8px;margin-right:.4rem;vertical-align:middle}
.strip{display:flex;gap:.8rem;overflow-x:auto;padding-bottom:.5rem}
figure{margin:0;flex:none}figcaption{font-size:.82rem;color:var(--soft);max-width:18rem}
figure img{display:block;min-width:14rem;border-radius:4px;background:var(--line)}
ul.plain{padding-left:1.2rem;overflow-wrap:anywhere}
""".strip()


def write_page(report: dict[str, Any], gallery: Gallery, strips: StripKeeper, folder: Path) -> Path:
    """index.html, whole or not at all."""
    part = folder / f".{PAGE_NAME}.{os.getpid()}"
    part.write_text("\n".join(_page(report, gallery, strips)) + "\n", encoding="utf-8")
    return part.replace(folder / PAGE_NAME)


def _page(report: dict[str, Any], gallery: Gallery, strips: StripKeeper) -> Iterator[str]:
    yield '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width,initial-scale=1">'
    yield '<link rel="icon" href="data:,">'  # or browsers ask for /favicon.ico
    yield f"<title>VAEs compared: {escape(report['preset'])}</title><style>{_STYLE}</style></head><body>"
    yield f"<h1>VAEs compared: {escape(report['preset'])}</h1><p>{escape(report['about'])}</p>"
    yield _vae_table(report)
    if report["notes"]:
        yield _list(report["notes"])
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
        yield _list([f"{each['key']}: {each['error_class']}: {each['message']}" for each in report["failures"]])
    yield "</body></html>"


def _vae_table(report: dict[str, Any]) -> str:
    head = ("VAE", "spec", "compression (t x h x w)", "latent channels", "weights")
    rows = []
    for label, vae in report["vaes"].items():
        stride = vae["space_stride"]
        weights = "random (seeded)" if vae["seeded"] else str(vae["weights_sha256"])[:12]
        compression = f"{vae['time_stride']} x {stride} x {stride}"
        rows.append((label, vae["spec"], compression, str(vae["latent_channels"]), weights))
    return _table(head, [[escape(cell) for cell in row] for row in rows])


def _means_table(result: dict[str, Any]) -> str:
    metrics = measured_metrics(result)
    head = ["VAE", *(f"{METRICS[metric]} {'↓' if metric in LOWER_IS_BETTER else '↑'}" for metric in metrics)]
    vaes: dict[str, dict[str, Any]] = {label: of["metrics"] for label, of in result["vaes"].items()}
    best = {m: best_label(m, {label: of.get(m, {}).get("mean") for label, of in vaes.items()}) for m in metrics}
    rows = [
        [escape(label), *(_mean_cell(metric, of.get(metric, {}), best[metric] == label) for metric in metrics)]
        for label, of in vaes.items()
    ]
    return _table(head, rows) + "<p>± is the standard error of the mean over windows.</p>"


def _mean_cell(metric: Metric, figure: dict[str, Any], is_best: bool) -> str:
    text = number_text(metric, figure.get("mean"))
    if figure.get("standard_error") is not None:
        text += f" <small>±{number_text(metric, figure['standard_error'])}</small>"
    return f"\0{text}" if is_best else text  # \0 marks the best cell for _table


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
        text += f"<div><h3>{escape(METRICS[metric])}</h3>{_table(head, rows)}</div>"
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
    figures = [_figure(example.source, f"source: {example.key}")]
    for label in labels:
        values = example.values[label]
        shown = ", ".join(f"{m} {number_text(m, values[m])}" for m in BY_FRAME if m in values)
        figures.append(_figure(example.decoded[label], f"{label}: {shown}"))
    for label in labels[:1] if first is not None else []:
        figures.append(_figure(example.errors[label], f"error of {label}, frame {example.worst_frame[label]}"))
    return f'<div class="strip">{"".join(figures)}</div>'


def _figure(uri: str, caption: str) -> str:
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def _published_table(published: list[dict[str, Any]]) -> str:
    metrics: list[Metric] = [metric for metric in METRICS if any(metric in row["figures"] for row in published)]
    rows = [
        [escape(row["method"]), *(number_text(metric, row["figures"].get(metric)) for metric in metrics)]
        for row in published
    ]
    return _table(["method", *(METRICS[metric] for metric in metrics)], rows)


def _table(head: list[str] | tuple[str, ...], rows: list[list[str]]) -> str:
    """Cells are HTML; one that starts with \\0 is the best of its column."""
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="best">{cell[1:]}</td>' if cell.startswith("\0") else f"<td>{cell}</td>" for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _list(items: list[str]) -> str:
    return f'<ul class="plain">{"".join(f"<li>{escape(item)}</li>" for item in items)}</ul>'
