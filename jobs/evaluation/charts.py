"""Line charts as inline SVG: no script, no font, no file beside the page."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 560, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 12, 42
COLOURS = 6
"""Colours there are (the page's --series-0 and so on); more series repeat them with other dashes."""


def line_chart(
    series: Mapping[str, Sequence[float | None]], ticks: Sequence[str], *, x_title: str, y_title: str, decimals: int
) -> str:
    """An <svg> with one line per series over evenly spaced ticks; None leaves a gap. "" if there is no number."""
    numbers = [value for values in series.values() for value in values if value is not None]
    if not numbers:
        return ""
    low, high, step = _axis(min(numbers), max(numbers))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_title)} by {escape(x_title)}">'
    ]
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        y = _y(value, low, high)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.{digits}f}</text>')
    every = max(1, math.ceil(len(ticks) / 17))
    for place, tick in enumerate(ticks):
        if place % every == 0:
            x = _x(place, len(ticks))
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{escape(tick)}</text>')
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    for number, (label, values) in enumerate(series.items()):
        parts.append(_line(number, label, values, ticks, low, high, decimals))
    parts.append("</svg>")
    return "".join(parts)


def bar_chart(
    centres: Sequence[float], heights: Sequence[float], *, x_title: str, y_title: str, decimals: int
) -> str:
    """A histogram as an <svg>: one bar per bin of equal width. "" without a bin."""
    if not heights:
        return ""
    top = max(heights) or 1.0
    floor = _y(0.0, 0.0, top)
    width = (WIDTH - _LEFT - _RIGHT) / len(heights)
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(y_title)} by {escape(x_title)}">'
        f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{floor:.1f}" y2="{floor:.1f}"/>'
    ]
    every = max(1, math.ceil(len(centres) / 9))
    for place, (centre, height) in enumerate(zip(centres, heights, strict=True)):
        x, y = _LEFT + place * width, _y(height, 0.0, top)
        parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(1.0, width - 1):.1f}" height="{floor - y:.1f}" '
            f'fill="var(--series-0)"><title>{centre:.{decimals}f}: {height:.3g}</title></rect>'
        )
        if place % every == 0:
            parts.append(
                f'<text x="{x + width / 2:.1f}" y="{HEIGHT - 24}" text-anchor="middle">{centre:.{decimals}f}</text>'
            )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text x="{middle:.0f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_title)}</text>')
    parts.append(f'<text x="{_LEFT - 6}" y="{_TOP + 8}" text-anchor="end">{top:.3g}</text></svg>')
    return "".join(parts)


def legend(labels: Sequence[str]) -> str:
    """What colour a label's line has."""
    items = (
        f'<li><svg viewBox="0 0 24 8" aria-hidden="true"><line x1="0" x2="24" y1="4" y2="4" {_stroke(number)}/></svg>'
        f"{escape(label)}</li>"
        for number, label in enumerate(labels)
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _line(
    number: int,
    label: str,
    values: Sequence[float | None],
    ticks: Sequence[str],
    low: float,
    high: float,
    decimals: int,
) -> str:
    points = [
        None if value is None else (_x(place, len(ticks)), _y(value, low, high)) for place, value in enumerate(values)
    ]
    runs = "".join(
        f"{'L' if place and points[place - 1] else 'M'}{point[0]:.1f} {point[1]:.1f}"
        for place, point in enumerate(points)
        if point
    )
    dots = "".join(
        f'<circle cx="{point[0]:.1f}" cy="{point[1]:.1f}" r="3.5" fill="var(--series-{number % COLOURS})">'
        f"<title>{escape(label)}, {escape(tick)}: {value:.{decimals}f}</title></circle>"
        for point, tick, value in zip(points, ticks, values, strict=True)
        if point and value is not None
    )
    return f'<path d="{runs}" fill="none" {_stroke(number)}/>{dots}'


def _stroke(number: int) -> str:
    dash = ("", "6 3", "2 3")[number // COLOURS % 3]
    return f'stroke="var(--series-{number % COLOURS})" stroke-width="2"' + (
        f' stroke-dasharray="{dash}"' if dash else ""
    )


def _axis(low: float, high: float) -> tuple[float, float, float]:
    """Round limits around the numbers, and the distance of grid lines: 3 to 8 of them."""
    spread = high - low or abs(high) * 0.1 or 1.0
    power = 10 ** math.floor(math.log10(spread / 4))
    step = next(power * factor for factor in (1, 2, 5, 10) if spread / (power * factor) <= 5)
    bottom, top = math.floor(low / step) * step, math.ceil(high / step) * step
    return (bottom, top, step) if top > bottom else (bottom - step, top + step, step)


def _x(place: int, count: int) -> float:
    inner = WIDTH - _LEFT - _RIGHT - 16
    return _LEFT + 8 + (inner / 2 if count == 1 else inner * place / (count - 1))


def _y(value: float, low: float, high: float) -> float:
    return _TOP + (HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))
