"""Source frames beside decoded latents: as a video, an animation or one picture.

    write_video(path, pair)          .mp4 (H.264), .gif or .webp: source on the left, decoded on the right
    write_picture(path, pairs)       .png: for each window a strip of source frames over its decoded ones

Both write the whole file or none.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from pipeline.decode_back import WindowPair
from pipeline.errors import ConfigError

MIN_HEIGHT = 256
"""Smaller windows are enlarged by a whole factor: pixels stay squares."""
GAP = 8
LABEL_HEIGHT = 24
DEFAULT_FPS = 8.0
"""Of windows whose source has no frame rate."""
_GROUND, _TEXT = (24, 26, 30), (235, 236, 238)


def write_video(path: Path, pair: WindowPair) -> Path:
    """The window as a moving picture, at its own frame rate. ConfigError for another suffix."""
    writers = {".mp4": _write_mp4, ".gif": _write_animation, ".webp": _write_animation}
    if path.suffix not in writers:
        raise ConfigError(f"expected a file that ends with one of {', '.join(writers)}, got {path}")
    frames = beside(pair)
    part = path.with_name(f".{os.getpid()}.{path.name}")
    writers[path.suffix](part, frames, pair.row.fps or DEFAULT_FPS)
    return part.replace(path)


def write_picture(path: Path, pairs: Sequence[WindowPair], *, columns: int = 5) -> Path:
    """One PNG of all windows, one below the other, `columns` frames of each, evenly spread. ValueError without one.

    What to call after a run, with the pairs of `pipeline.decode_back.DecodeBack`.
    """
    if not pairs:
        raise ValueError("write_picture: expected at least one window, got none")
    strips = [_strip(pair, columns) for pair in pairs]
    width = max(strip.width for strip in strips)
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips) + GAP * (len(strips) - 1)), _GROUND)
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height + GAP
    part = path.with_name(f".{os.getpid()}.{path.name}")
    sheet.save(part, "PNG")
    return part.replace(path)


def beside(pair: WindowPair) -> np.ndarray:
    """uint8 (T, H', W', 3): labels on top, the source on the left. Both sides are even, as H.264 needs."""
    source, decoded = _enlarged(pair.source_THWC), _enlarged(pair.decoded_THWC)
    time, height, width, _ = source.shape
    out = np.empty((time, height + LABEL_HEIGHT, 2 * width + GAP, 3), np.uint8)
    out[:] = _GROUND
    for position in range(time):
        labels = ("source", f"decoded {pair.psnr_T[position]:.1f} dB")
        out[position, :LABEL_HEIGHT] = _labels(labels, out.shape[2], width + GAP)
    out[:, LABEL_HEIGHT:, :width] = source
    out[:, LABEL_HEIGHT:, width + GAP :] = decoded
    return out


def _strip(pair: WindowPair, columns: int) -> Image.Image:
    """Source frames over decoded ones, and what window it is."""
    source, decoded = _enlarged(pair.source_THWC), _enlarged(pair.decoded_THWC)
    time, height, width, _ = source.shape
    shown = sorted({round(place) for place in np.linspace(0, time - 1, min(columns, time))})
    sheet = Image.new("RGB", (len(shown) * width, 2 * height + LABEL_HEIGHT), _GROUND)
    for column, position in enumerate(shown):
        sheet.paste(Image.fromarray(source[position]), (column * width, LABEL_HEIGHT))
        sheet.paste(Image.fromarray(decoded[position]), (column * width, LABEL_HEIGHT + height))
    title = f"{pair.row.key}   above: source   below: decoded latents   PSNR {pair.psnr:.1f} dB"
    sheet.paste(Image.fromarray(_labels((title,), sheet.width, sheet.width)), (0, 0))
    return sheet


def _labels(texts: Sequence[str], width: int, step: int) -> np.ndarray:
    """(LABEL_HEIGHT, width, 3): a text every `step` pixels."""
    image = Image.new("RGB", (width, LABEL_HEIGHT), _GROUND)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    for number, text in enumerate(texts):
        draw.text((number * step + 6, 4), text, fill=_TEXT, font=font)
    return np.asarray(image)


def _enlarged(frames_THWC: np.ndarray) -> np.ndarray:
    factor = -(-MIN_HEIGHT // frames_THWC.shape[1])
    return frames_THWC.repeat(factor, axis=1).repeat(factor, axis=2)


def _write_mp4(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    """H.264 where PyAV's build has x264, else MPEG-4."""
    codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
    _, height, width, _ = frames_THWC.shape
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        stream.options = {"crf": "16"} if codec == "libx264" else {"qscale": "2"}
        for frame_HWC in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame_HWC, format="rgb24")))
        container.mux(stream.encode())


def _write_animation(path: Path, frames_THWC: np.ndarray, fps: float) -> None:
    first, *others = [Image.fromarray(frame) for frame in frames_THWC]
    file_format = path.suffix[1:].upper()
    first.save(path, file_format, save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
