"""Protocols of the papers as literals: clip shapes, metrics, and the figures that were published under them.

A preset fixes what a protocol fixes and nothing of the data: the clips are the user's. `docs/evaluation.md` says what
of each protocol is known and what is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from cvvae import VAESpec
from cvvae.i3d import FVDResize
from cvvae.lpips import Averaging, Backbone
from pipeline.errors import ConfigError

Metric = Literal["psnr", "psnr_video", "ssim", "lpips", "information", "fvd"]
METRICS: dict[Metric, str] = {
    "psnr": "PSNR (dB, mean over frames)",
    "psnr_video": "PSNR (dB, error of whole videos)",
    "ssim": "SSIM",
    "lpips": "LPIPS",
    "information": "information preserved",
    "fvd": "FVD",
}
LOWER_IS_BETTER: frozenset[Metric] = frozenset({"lpips", "fvd"})
SMALLEST_SIDES: dict[Metric, int] = {"ssim": 11, "lpips": 32}
PLAIN: tuple[Metric, ...] = ("psnr", "psnr_video", "ssim", "information")
"""Those that need no network's weights."""


@dataclass(frozen=True, slots=True)
class ClipShape:
    """Frames, and (height, width); size None is each clip's own, cut to what the VAEs take."""

    frames: int
    size: tuple[int, int] | None

    def __str__(self) -> str:
        return f"{self.frames} frames, " + (f"{self.size[0]} x {self.size[1]}" if self.size else "each clip's size")


@dataclass(frozen=True, slots=True)
class Published:
    """One row of a paper's table."""

    method: str
    figures: dict[Metric, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A protocol."""

    name: str
    about: str
    shapes: tuple[ClipShape, ...]
    frame_stride: int = 1
    metrics: tuple[Metric, ...] = PLAIN
    backbone: Backbone = "alex"
    averaging: Averaging = "features"
    fvd_resize: FVDResize = "short-side"
    limit: int | None = None
    """Clips taken at random where more are given."""
    motion_subset: int | None = None
    """Clips chosen so that their motion scores are spread evenly."""
    published: tuple[Published, ...] = ()


def _rows(metrics: tuple[Metric, ...], table: dict[str, tuple[float, ...]]) -> tuple[Published, ...]:
    return tuple(Published(method, dict(zip(metrics, row, strict=True))) for method, row in table.items())


_THREE: tuple[Metric, ...] = ("psnr", "ssim", "lpips")
_FOUR: tuple[Metric, ...] = ("fvd", "psnr", "ssim", "lpips")

_KINETICS = Preset(
    name="ivvae-kinetics",
    about="IV-VAE (arXiv 2411.06449), Kinetics-600 validation: the first 17 frames of 2400 random videos, own size",
    shapes=(ClipShape(17, None),),
    metrics=("fvd", *PLAIN, "lpips"),
    averaging="pixels",
    limit=2400,
    published=(
        *_rows(
            _FOUR,
            {
                "SVD VAE (no temporal compression)": (6.26, 35.26, 0.9363, 0.0368),
                "CV-VAE (z 4)": (16.81, 31.58, 0.9066, 0.0827),
                "OD-VAE (z 4)": (10.69, 33.88, 0.9242, 0.0549),
                "IV-VAE (z 4, width 64)": (8.01, 34.29, 0.9281, 0.0521),
                "IV-VAE (z 16, width 64)": (2.97, 39.02, 0.9685, 0.0228),
            },
        ),
        *_rows(_THREE, {"IV-VAE (z 16, width 96)": (39.57, 0.9711, 0.02054)}),
    ),
)
_WEBVID = Preset(
    name="cvvae-webvid",
    about="CV-VAE (arXiv 2405.20279), WebVid validation: 1024 videos, 33 frames, every third, 256 x 256",
    shapes=(ClipShape(33, (256, 256)),),
    frame_stride=3,
    metrics=(*PLAIN, "lpips"),
    limit=1024,
    published=_rows(
        _THREE,
        {
            "VAE-SD2.1 (no temporal compression)": (28.9, 0.810, 0.145),
            "VQGAN f8-8192 (no temporal compression)": (24.6, 0.718, 0.179),
            "TATS": (24.1, 0.729, 0.310),
            "Open-Sora-Plan": (26.7, 0.781, 0.166),
            "CV-VAE 2D+3D (z 4)": (28.5, 0.817, 0.143),
            "CV-VAE 3D (z 4)": (28.6, 0.819, 0.145),
            "VAE-SD3 (no temporal compression)": (33.4, 0.910, 0.064),
            "CV-VAE SD3 (z 16)": (32.0, 0.899, 0.087),
        },
    ),
)
_COCO = Preset(
    name="cvvae-coco",
    about="CV-VAE (arXiv 2405.20279), COCO 2017 validation: images, 256 x 256, short side resized and centre cropped",
    shapes=(ClipShape(1, (256, 256)),),
    metrics=(*PLAIN, "lpips"),
    published=_rows(
        _THREE,
        {
            "VAE-SD2.1": (26.6, 0.773, 0.127),
            "VQGAN f8-8192": (22.7, 0.678, 0.186),
            "TATS": (23.4, 0.741, 0.287),
            "Open-Sora-Plan": (27.0, 0.791, 0.142),
            "CV-VAE 2D+3D (z 4)": (27.6, 0.805, 0.136),
            "CV-VAE 3D (z 4)": (27.7, 0.805, 0.135),
            "VAE-SD3": (32.6, 0.899, 0.064),
            "CV-VAE SD3 (z 16)": (33.6, 0.916, 0.072),
        },
    ),
)


def _motion_hd(lines: int, width: int, fvd: float, psnr: float, lpips: float) -> Preset:
    return replace(
        _KINETICS,
        name=f"ivvae-motionhd-{lines}p",
        about=f"IV-VAE (arXiv 2411.06449), MotionHD: 17 frames of 2000 videos spread evenly over motion, {lines}p",
        shapes=(ClipShape(17, (lines, width)),),
        limit=None,
        motion_subset=2000,
        published=_rows(("fvd", "psnr", "lpips"), {"CV-VAE (z 4)": (fvd, psnr, lpips)}),
    )


_ALL = (
    Preset(
        name="plain",
        about="17 frames of 256 x 256, metrics that need no other network",
        shapes=(ClipShape(17, (256, 256)),),
    ),
    _WEBVID,
    _COCO,
    Preset(
        name="odvae-33x256",
        about="OD-VAE (arXiv 2409.01199): 33 frames of 256 x 256; the figures are those of WebVid and Panda-70M",
        shapes=(ClipShape(33, (256, 256)),),
        metrics=(*PLAIN, "lpips"),
        averaging="pixels",
        published=_rows(
            _THREE, {"OD-VAE on WebVid": (31.16, 0.8694, 0.0586), "OD-VAE on Panda-70M": (30.49, 0.8970, 0.0454)}
        ),
    ),
    _KINETICS,
    replace(
        _KINETICS,
        name="ivvae-activitynet",
        about="IV-VAE (arXiv 2411.06449), ActivityNet test: the first 17 frames of 2400 random videos, own size",
        published=_rows(_FOUR, {"CV-VAE (z 4)": (12.57, 34.87, 0.9156, 0.0685)}),
    ),
    _motion_hd(480, 848, 22.33, 29.70, 0.094),
    _motion_hd(720, 1280, 12.78, 30.29, 0.098),
    _motion_hd(1080, 1920, 8.50, 31.19, 0.098),
    Preset(
        name="ivvae-groups",
        about="IV-VAE (arXiv 2411.06449), A.2: quality by position within a group of frames, 17 frames, own size",
        shapes=(ClipShape(17, None),),
    ),
    Preset(
        name="ivvae-information",
        about="IV-VAE (arXiv 2411.06449), A.1: information preserved, by length and size; images are length 1",
        shapes=tuple(ClipShape(frames, (side, side)) for side in (256, 512) for frames in (1, 5, 17, 33)),
        metrics=("information", "psnr"),
    ),
)
PRESETS: dict[str, Preset] = {preset.name: preset for preset in _ALL}


@dataclass(frozen=True, slots=True)
class FittedShape:
    """A shape that every compared VAE takes, and what was given up for it."""

    shape: ClipShape
    multiple: int
    """Sides are multiples of this: the least common one of all VAEs."""
    min_side: int
    """What the metrics need at least."""
    notes: tuple[str, ...] = ()


def fit_shape(shape: ClipShape, specs: Sequence[VAESpec], *, metrics: Sequence[Metric] = ()) -> FittedShape:
    """The largest shape up to `shape` that all VAEs and the metrics take. ConfigError if there is none."""
    multiple = math.lcm(*(spec.space_stride for spec in specs))
    lengths = (n for n in range(shape.frames, 0, -1) if all(spec.is_valid_num_frames(n) for spec in specs))
    frames = next(lengths, None)
    if frames is None:
        rules = ", ".join(f"{spec.name}: {spec.frames_rule}" for spec in specs)
        raise ConfigError(f"no length up to {shape.frames} frames is one that every VAE takes ({rules})")
    size = shape.size and (shape.size[0] // multiple * multiple, shape.size[1] // multiple * multiple)
    min_side = max([multiple, *(SMALLEST_SIDES.get(metric, 1) for metric in metrics)])
    if size is not None and min(size) < min_side:
        raise ConfigError(f"{shape}: expected sides of at least {min_side} pixels and multiples of {multiple}")
    fitted = ClipShape(frames, size)
    notes = []
    if frames != shape.frames:
        notes.append(f"{frames} of {shape.frames} frames: the longest that every VAE takes")
    if size != shape.size:
        notes.append(f"{fitted} instead of {shape}: sides are multiples of {multiple}")
    return FittedShape(fitted, multiple, min_side, tuple(notes))
