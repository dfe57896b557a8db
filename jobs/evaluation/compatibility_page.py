"""The compatibility tables on the page, and a few windows as each decoder shows the other's latents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs.evaluation.compatibility_tables import tables_of
from jobs.evaluation.examples import picture_uri, shrunk
from jobs.evaluation.presets import ClipShape

KEPT_FIRST = 2


@dataclass(frozen=True, slots=True)
class Strip:
    """One window: its source and the decoded videos by caption, uint8 THWC, made small."""

    title: str
    order: int
    motion: float | None
    pictures: Mapping[str, np.ndarray]


class StripKeeper:
    """Keeps the first windows of each shape, its stillest and its most moving one; whatever the number of windows."""

    def __init__(self) -> None:
        self._seen: dict[ClipShape, int] = {}
        self._first: list[Strip] = []
        self._stillest: dict[ClipShape, Strip] = {}
        self._most_moving: dict[ClipShape, Strip] = {}

    def add(
        self, shape: ClipShape, key: str, motion: float | None, source_THWC: np.ndarray, shown: Mapping[str, Tensor]
    ) -> None:
        """`shown` are videos (1, 3, T, H, W), float [0, 1], by caption."""
        order = self._seen[shape] = self._seen.get(shape, 0) + 1
        still, moving = self._stillest.get(shape), self._most_moving.get(shape)
        is_stillest = motion is not None and (still is None or motion < _score(still))
        is_most_moving = motion is not None and (moving is None or motion > _score(moving))
        if order > KEPT_FIRST and not is_stillest and not is_most_moving:
            return
        flow = "" if motion is None else f", {motion:.2f} pixels of motion a frame"
        pictures = {"source": source_THWC, **{caption: _eight_bit(video) for caption, video in shown.items()}}
        small = {caption: shrunk(frames_THWC) for caption, frames_THWC in pictures.items()}
        strip = Strip(f"{key}: {shape}{flow}", order, motion, small)
        if order <= KEPT_FIRST:
            self._first.append(strip)
        if is_stillest:
            self._stillest[shape] = strip
        if is_most_moving:
            self._most_moving[shape] = strip

    def strips(self) -> list[Strip]:
        """Each window once: the stillest first, then the most moving, then the first ones."""
        kept = [*self._stillest.values(), *self._most_moving.values(), *self._first]
        return list({strip.title: strip for strip in kept}.values())


def _score(strip: Strip) -> float:
    assert strip.motion is not None, "only windows with a score are compared"
    return strip.motion


def _eight_bit(video_BCTHW: Tensor) -> np.ndarray:
    return (video_BCTHW[0] * 255).round().to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def compatibility_html(section: dict[str, Any], keeper: StripKeeper) -> Iterator[str]:
    """The part of the page about report["compatibility"]."""
    judge = section["image_vae"]["label"]
    yield f"<h2>Compatibility with {escape(judge)}</h2>"
    mappings = "; ".join(f"{name}: {what}" for name, what in section["mappings"].items())
    yield (
        f"<p>Which frames a video latent is held against: {escape(mappings)}. Single figures are under "
        f"{escape(section['default_mapping'])}. Kernel distance: {escape(section['kernel'])}.</p>"
    )
    for title, head, rows in tables_of(section):
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        yield f"<h3>{escape(title)}</h3>"
        yield f'<div class="wide"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'
    for strip in keeper.strips():
        yield f"<h3>{escape(strip.title)}</h3>"
        figures = "".join(
            f'<figure><img src="{picture_uri(frames)}" alt="{escape(caption)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for caption, frames in strip.pictures.items()
        )
        yield f'<div class="strip">{figures}</div>'
