"""Frames by decord: the fallback where PyAV's libav cannot decode.

decord (0.6.0, ffmpeg 4.1) is asked for pixels only. Its frame times are wrong where the first packets are hidden by
an edit list or have no time stamp, its length counts hidden frames, and it replaces a frame it cannot decode by a
neighbour. So times, length and container facts come from PyAV's demuxer, every replaced frame is an error
(`fault_tol`), and a clip whose frames are fewer than its packets is refused. Damage that decord's own codecs hide
is not detectable: 10-bit video is read, but rounds differently (up to 13 levels) from PyAV.

A clip is decoded twice: once to see that it can be, then for its frames. decord decodes in a thread of its own, so
how many frames it gives before it reports an error is chance, and windows given by chance would shift the batches
of all that follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Self

import decord
import numpy as np
from decord import DECORDError, DECORDLimitReachedError

from pipeline.decode.frames import SourceFrame
from pipeline.decode.pyav_backend import probe
from pipeline.errors import ClipError, RejectionClass

DECODER = f"decord-{decord.__version__}"
_ERRORS = (DECORDError, DECORDLimitReachedError, RuntimeError)
_NO_REPLACED_FRAME = 1e-9  # a share of the frames: any single one is too many. 0 would mean "do not check"


class DecordFrames:
    """Reads one frame after the other; never seeks."""

    def __init__(self, path: str, *, threads: int = 1) -> None:
        decord.logging.set_level(decord.logging.QUIET)
        self._path = path
        found = probe(path)
        if found.orientation.mirrored:
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", "decord does not mirror a mirrored video")
        self.video = replace(found.video, decoder=DECODER)
        self._times = found.times
        self._threads = threads
        self._reader = self._open()
        for number in range(len(self._times)):
            self._next_frame(number)
        self._reader = self._open()

    def _open(self) -> decord.VideoReader:
        try:
            # its stub says int; a share is documented
            return decord.VideoReader(self._path, num_threads=self._threads, fault_tol=_NO_REPLACED_FRAME)  # pyright: ignore[reportArgumentType]
        except _ERRORS as error:
            raise _failure(error, self._path) from error

    def __iter__(self) -> Iterator[SourceFrame]:
        for number, time in enumerate(self._times):
            pixels = self._next_frame(number)
            height, width, _ = pixels.shape
            if (width, height) != (self.video.width, self.video.height):
                message = f"frame {number} is {width}x{height}, the first {self.video.width}x{self.video.height}"
                raise ClipError(RejectionClass.RESOLUTION_CHANGED, "decode", message)
            yield SourceFrame(number, time, lambda pixels=pixels: pixels)

    def _next_frame(self, number: int) -> np.ndarray:
        try:
            return self._reader.next().asnumpy()
        except StopIteration:
            message = f"decord found {number} of {len(self._times)} frames"
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", message) from None
        except _ERRORS as error:
            raise _failure(error, self._path) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._reader  # decord has no close


def _failure(error: Exception, path: str) -> ClipError:
    """DECODE_FAILED, whatever went wrong: decord cannot tell damage from what it does not know.

    Time of day, source lines and file names are cut out: receipts must not differ between runs.
    """
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    text = re.sub(r"\[[\d:]+\]\s+\S+:\d+:\s*", "", text)  # more than once where its threads pass errors on
    text = text.replace(f"[{path}]", "").replace(path, "the clip")
    return ClipError(RejectionClass.DECODE_FAILED, "decode", f"decord: {' '.join(text.split())}")
