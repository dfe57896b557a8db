"""The clips that VAEs are compared on: files, images and tars into windows of one shape, failures by name.

Videos are decoded by the pipeline's own pool of killable processes, so that they are cut and resized exactly as they
are when latents are made of them. Images go through Pillow and the same resizer.
"""

from __future__ import annotations

import io
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from PIL import Image, ImageOps

from jobs.evaluation.presets import ClipShape, FittedShape
from pipeline.decode.blob import Blob
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodePool, WindowReady
from pipeline.decode.resize import resizer_for
from pipeline.errors import ClipError, ConfigError, RejectionClass, SourceError
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.records import Clip, Rejection, SourceVideo, Window
from pipeline.sources import SourceDigest, WebDatasetSource, read_shard
from pipeline.sources.clip_file import fetch_clip
from pipeline.sources.spec import VIDEO_EXTENSIONS
from pipeline.sources.tar import plan_tars
from pipeline.storage import glob_objects, list_folder, object_info

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


@dataclass(frozen=True, slots=True)
class ClipFile:
    """Something to read. `key` names it in reports; of a tar it is only the tar."""

    url: str
    key: str
    kind: Literal["video", "image", "tar"]


@dataclass(frozen=True, slots=True)
class SourceWindow:
    """What a VAE is given: uint8 RGB of one shape."""

    key: str
    clip_key: str
    frames_THWC: np.ndarray
    fps: float | None


def find_clips(patterns: Sequence[str], *, limit: int | None = None, seed: int = 0) -> list[ClipFile]:
    """Files, globs, folders and URLs in the order of their keys; `limit` of them at random if there are more.

    SourceError if a pattern finds nothing; ConfigError if `limit` would have to choose inside tars.
    """
    urls: dict[str, ClipFile] = {}
    for pattern in patterns:
        found = [file for url in _expand(pattern) if (file := _clip_file(url)) is not None]
        if not found:
            endings = ", ".join((*VIDEO_EXTENSIONS, *IMAGE_EXTENSIONS, "tar"))
            raise SourceError(f"--clips: nothing to evaluate at {pattern!r} (of {endings})")
        urls |= {file.url: file for file in found}
    twice = {key for key, count in Counter(file.key for file in urls.values()).items() if count > 1}
    files = [replace(file, key=file.url) if file.key in twice else file for file in urls.values()]
    files.sort(key=lambda file: (file.key, file.url))
    if limit is None or (len(files) <= limit and all(file.kind != "tar" for file in files)):
        return files
    if any(file.kind == "tar" for file in files):
        raise ConfigError(
            f"{limit} clips at random: clips inside tars cannot be chosen; give plain files, or --limit 0 for all"
        )
    chosen = set(random.Random(seed).sample(range(len(files)), limit))
    return [file for number, file in enumerate(files) if number in chosen]


def _expand(pattern: str) -> list[str]:
    try:
        if any(character in pattern for character in "*?["):
            return [info.url for info in glob_objects(pattern)]
        if _clip_file(pattern) is not None:
            return [object_info(pattern).url]
        return [info.url for info in list_folder(pattern)]
    except FileNotFoundError as error:
        raise SourceError(f"--clips: {pattern} does not exist") from error
    except (ValueError, NotADirectoryError) as error:
        raise ConfigError(f"--clips: {pattern!r}: {error}") from error


def _clip_file(url: str) -> ClipFile | None:
    extension = url.rpartition(".")[2].lower()
    key = url.rstrip("/").rpartition("/")[2]
    if extension in VIDEO_EXTENSIONS:
        return ClipFile(url, key, "video")
    if extension in IMAGE_EXTENSIONS:
        return ClipFile(url, key, "image")
    return ClipFile(url, key, "tar") if extension == "tar" else None


class WindowReader:
    """Windows of files. What could not be read is in `failures`, once per clip whatever the number of passes."""

    def __init__(
        self, pool: DecodePool, *, frame_stride: int, windows_per_clip: int, only: frozenset[str] | None = None
    ) -> None:
        """`only` are the keys of clips to keep; None keeps all."""
        self._pool = pool
        self._frame_stride = frame_stride
        self._windows_per_clip = windows_per_clip
        self.only = only
        self.failures: dict[tuple[str, str], Rejection] = {}

    def read(self, files: Sequence[ClipFile], fitted: FittedShape) -> Iterator[SourceWindow]:
        """All windows of that shape, in the order of the files: first images, then videos."""
        for file in files:
            if file.kind == "image" and (self.only is None or file.key in self.only):
                yield from self._image(file, fitted)
        clips = self._clips(file for file in files if file.kind != "image")
        if fitted.shape.size is not None:
            yield from self._decode(clips, fitted.shape, fitted.shape.size)
            return
        for clip in clips:
            size = self._own_size(clip, fitted)
            if size is not None:
                yield from self._decode(iter((clip,)), fitted.shape, size)

    def _clips(self, files: Iterator[ClipFile]) -> Iterator[Clip]:
        for file in files:
            for item in self._tar(file) if file.kind == "tar" else self._file(file):
                if isinstance(item, Rejection):
                    self._fail(item)
                elif self.only is None or item.key in self.only:
                    yield item
                else:
                    item.video.close()

    def _tar(self, file: ClipFile) -> Iterator[Clip | Rejection]:
        source = WebDatasetSource(urls=file.url, options={})
        for shard in plan_tars(source):
            limit = self._pool.policy.max_clip_bytes
            for item in read_shard(shard, source, max_clip_bytes=limit, digest=SourceDigest()):
                # keys are unique within a tar only
                yield replace(item, key=f"{file.key}/{item.key}")

    def _file(self, file: ClipFile) -> Iterator[Clip | Rejection]:
        try:
            blob, sha256 = fetch_clip(file.url, None, max_bytes=self._pool.policy.max_clip_bytes)
        except ClipError as error:
            yield Rejection.from_error(error, key=file.key, shard_id="clips")
            return
        yield Clip(
            key=file.key,
            shard_id="clips",
            video=blob,
            video_sha256=sha256,
            file_name=file.url,
            caption="",
            metadata={},
        )

    def _own_size(self, clip: Clip, fitted: FittedShape) -> tuple[int, int] | None:
        """(height, width) of the clip as displayed, cut to multiples; None (a failure, clip closed) if too small."""
        probe = replace(clip, video=Blob(os.dup(clip.video.fd), clip.video.size))
        first = WindowPolicy(frames=1, max_windows=1)
        found: SourceVideo | None = None
        for event in self._pool.decode(iter((probe,)), first, ResizePolicy(buckets=((8, 8),)), (1,)):
            if isinstance(event, WindowReady):
                found = event.window.source
            elif isinstance(event, ClipDone) and event.rejection is not None:
                self._fail(event.rejection)
                found = None
        if found is None:
            clip.video.close()
            return None
        height, width = (
            int(side) // fitted.multiple * fitted.multiple
            for side in (found.height, found.width * found.sample_aspect_ratio + 1e-6)
        )
        if min(height, width) < fitted.min_side:
            clip.video.close()
            message = f"{found.width}x{found.height} is below {fitted.min_side} pixels"
            self._reject(clip.key, RejectionClass.TOO_SMALL, message)
            return None
        return height, width

    def _decode(self, clips: Iterator[Clip], shape: ClipShape, size: tuple[int, int]) -> Iterator[SourceWindow]:
        windows = WindowPolicy(
            frames=shape.frames, frame_stride=self._frame_stride, max_windows=self._windows_per_clip
        )
        given: list[Window] = []  # of the clip that is being decoded: void until it is done
        for event in self._pool.decode(clips, windows, ResizePolicy(buckets=(size,)), (shape.frames,)):
            match event:
                case WindowReady(window):
                    given.append(window)
                case ClipRetracted():
                    given.clear()
                case ClipDone(rejection=None):
                    yield from (
                        SourceWindow(window.key, window.clip_key, window.frames_THWC, window.fps) for window in given
                    )
                    given.clear()
                case ClipDone(rejection=Rejection() as rejection):
                    given.clear()
                    self._fail(rejection)

    def _image(self, file: ClipFile, fitted: FittedShape) -> Iterator[SourceWindow]:
        if fitted.shape.frames > 1:
            self._reject(
                file.key, RejectionClass.TOO_SHORT, f"an image where {fitted.shape.frames} frames are needed"
            )
            return
        try:
            yield SourceWindow(
                file.key, file.key, _image_frame(file, fitted, self._pool.policy.max_clip_bytes)[None], None
            )
        except ClipError as error:
            self._fail(Rejection.from_error(error, key=file.key, shard_id="clips"))

    def _reject(self, key: str, error_class: RejectionClass, message: str) -> None:
        self._fail(Rejection.from_error(ClipError(error_class, "window", message), key=key, shard_id="clips"))

    def _fail(self, rejection: Rejection) -> None:
        self.failures[rejection.key, rejection.error_class] = rejection


def _image_frame(file: ClipFile, fitted: FittedShape, max_bytes: int) -> np.ndarray:
    """(H, W, 3) uint8. ClipError if Pillow cannot read it, or it is too small."""
    blob, _ = fetch_clip(file.url, None, max_bytes=max_bytes)
    try:
        with blob, Image.open(io.BytesIO(blob.map() if blob.size else b"")) as image:
            pixels_HWC = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow's readers raise
        raise ClipError(RejectionClass.DECODE_FAILED, "decode", f"not a readable image: {error}") from error
    height, width, _ = pixels_HWC.shape
    size = fitted.shape.size or (
        height // fitted.multiple * fitted.multiple,
        width // fitted.multiple * fitted.multiple,
    )
    if min(size) < fitted.min_side:
        message = f"{width}x{height} is below {fitted.min_side} pixels"
        raise ClipError(RejectionClass.TOO_SMALL, "resize", message)
    still = SourceVideo(
        width=width,
        height=height,
        sample_aspect_ratio=1.0,
        rotation=0,
        fps=None,
        duration=None,
        codec="image",
        decoder="pillow",
    )
    return resizer_for(still, ResizePolicy(buckets=(size,)))(pixels_HWC)
