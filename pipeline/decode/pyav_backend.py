"""Frames by PyAV: the strict decoder, and the one door to libav.

Colours: libswscale converts with each frame's own matrix and range; a file that states none is taken for BT.601
limited range, whatever its size. decord's libav does the same, bit for bit for 8-bit video.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Self

import av
import av.error
import av.logging
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from pipeline.decode.frames import SourceFrame
from pipeline.errors import ClipError, RejectionClass
from pipeline.records import SourceVideo

if TYPE_CHECKING:
    from av.packet import Packet

DECODER = f"pyav-{av.__version__}"

MAX_FRAME_PIXELS = 64 << 20
"""Larger frames are refused before anything of that size is allocated (8K has 33 million pixels)."""

# Real video containers only. What libav also opens are playlists that name other files, still pictures and devices.
_CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg"
_DEMUX_OPTIONS = {
    "format_whitelist": _CONTAINERS,
    "protocol_whitelist": "file",
    "max_pixels": str(MAX_FRAME_PIXELS),
}
_CODEC_OPTIONS = {"err_detect": "explode", "max_pixels": str(MAX_FRAME_PIXELS)}
_UNIT = 1 << 16  # 1.0 in a display matrix


@dataclass(frozen=True, slots=True)
class Orientation:
    """How stored pixels are turned for display: a counterclockwise rotation, then a mirroring."""

    quarter_turns: int = 0
    mirrored: bool = False

    @classmethod
    def from_matrix(cls, matrix: tuple[int, ...]) -> Orientation:
        """From libav's display matrix (a, b, u, c, d, v, x, y, w): x' = a x + c y, y' = b x + d y, y down.

        ClipError for one that is not made of quarter turns and mirrorings.
        """
        a, b, _, c, d = matrix[:5]
        mirrored = a * d - b * c < 0
        if mirrored:
            a, c = -a, -c  # undo the left-right mirroring, which comes last
        turns = {(_UNIT, 0): 0, (0, -_UNIT): 1, (-_UNIT, 0): 2, (0, _UNIT): 3}.get((a, b))
        if turns is None or (c, d) != (-b, a):
            message = f"the display matrix is no quarter turn: {matrix[:2] + matrix[3:5]}"
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", message)
        return cls(turns, mirrored)

    @property
    def degrees_clockwise(self) -> int:
        return -90 * self.quarter_turns % 360

    @property
    def swaps_sides(self) -> bool:
        return self.quarter_turns % 2 == 1

    def apply(self, image_HWC: np.ndarray) -> np.ndarray:
        """The displayed picture: exact, no resampling."""
        turned = np.rot90(image_HWC, self.quarter_turns)
        return turned[:, ::-1] if self.mirrored else turned


@dataclass(frozen=True, slots=True)
class Probe:
    """What PyAV says about a clip for a decoder that cannot say it: times come from the packets."""

    video: SourceVideo
    orientation: Orientation
    times: tuple[float, ...]
    """Of every frame that is shown, in seconds from the first."""


class PyAvFrames:
    """Decodes strictly: see `frames.py` for what is refused."""

    def __init__(self, path: str, *, threads: int = 1) -> None:
        av.logging.set_level(av.logging.FATAL)
        self._container = open_container(path)
        try:
            self._stream = _video_stream(self._container)
            self._stream.codec_context.options = _CODEC_OPTIONS
            self._stream.codec_context.thread_count = threads
            self._reformatter = VideoReformatter()
            self._decoded = self._decode()
            self._first = next(self._decoded, None)
            if self._first is None:
                raise ClipError(RejectionClass.NO_FRAMES, "decode", "the video stream holds no frame")
            self.orientation = _orientation(self._first)
            self.video = _describe(self._container, self._stream, self._first, self.orientation)
        except BaseException:  # whatever it is passes on; the container must not stay open behind it
            self.close()
            raise

    def __iter__(self) -> Iterator[SourceFrame]:
        first = self._first
        assert first is not None, "a clip without frames does not open"
        self._first = None
        origin = previous = _presented(first, 0)
        yield self._source_frame(first, 0, 0.0)
        for number, frame in enumerate(self._decoded, start=1):
            presented = _presented(frame, number)
            if presented < previous:
                message = f"frame {number} is presented before frame {number - 1}"
                raise ClipError(RejectionClass.DECODE_FAILED, "decode", message)
            if (frame.width, frame.height) != (first.width, first.height):
                message = f"frame {number} is {frame.width}x{frame.height}, the first {first.width}x{first.height}"
                raise ClipError(RejectionClass.RESOLUTION_CHANGED, "decode", message)
            previous = presented
            yield self._source_frame(frame, number, float(presented - origin))

    def _source_frame(self, frame: VideoFrame, number: int, time: float) -> SourceFrame:
        return SourceFrame(number, time, lambda: self._to_rgb(frame))

    def _to_rgb(self, frame: VideoFrame) -> np.ndarray:
        # One for all frames: frame.reformat would set libswscale up anew for each.
        converted = self._reformatter.reformat(frame, format="rgb24", threads=1)
        return self.orientation.apply(converted.to_ndarray())

    def _decode(self) -> Iterator[VideoFrame]:
        """Frames as libav presents them (edit lists applied), any sign of damage an error."""
        count = 0
        with _decoding_errors():
            for packet in self._container.demux(self._stream):
                if packet.is_corrupt:
                    message = f"a packet after frame {count} is cut short or damaged"
                    raise ClipError(RejectionClass.CORRUPT_FRAMES, "decode", message)
                if _repeats_the_picture(packet):
                    continue
                for frame in packet.decode():
                    assert isinstance(frame, VideoFrame), "a video stream's packets hold video frames"
                    if frame.is_corrupt:
                        raise ClipError(RejectionClass.CORRUPT_FRAMES, "decode", f"frame {count} is damaged")
                    yield frame
                    count += 1

    def close(self) -> None:
        self._container.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_container(path: str) -> InputContainer:
    try:
        # tags in another encoding, such as a Latin-1 title, say nothing about the pictures
        return av.open(path, options=_DEMUX_OPTIONS, metadata_errors="replace")
    except av.error.FFmpegError as error:
        message = f"no video container that libav knows, or its header is damaged ({error.strerror})"
        raise ClipError(RejectionClass.UNSUPPORTED_CONTAINER, "decode", message) from error


def probe(path: str) -> Probe:
    """Container facts, orientation and frame times. Decodes the first frame, reads the rest without decoding."""
    with PyAvFrames(path) as frames:
        video, orientation = frames.video, frames.orientation
    with open_container(path) as container, _decoding_errors():
        streams = [stream for stream in container.streams.video if not _is_picture(stream)]
        if len(streams) > 1:
            message = f"{len(streams)} video streams: only PyAV can be told which one to read"
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", message)
        stamps: list[Fraction] = []
        for packet in container.demux(streams[0]):
            if packet.is_corrupt:
                raise ClipError(RejectionClass.CORRUPT_FRAMES, "decode", "a packet is cut short or damaged")
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None or packet.time_base is None:
                raise ClipError(RejectionClass.DECODE_FAILED, "decode", "a packet has no presentation time")
            stamps.append(packet.pts * packet.time_base)
    stamps.sort()
    return Probe(video, orientation, tuple(float(stamp - stamps[0]) for stamp in stamps))


@contextmanager
def _decoding_errors() -> Iterator[None]:
    """libav's errors as ClipError. Damage is told apart from what this libav cannot do: only the latter falls back.

    Messages leave out what libav appends (file names, descriptors): receipts must not differ between runs.
    """
    try:
        yield
    except av.error.InvalidDataError as error:
        message = "libav found damaged or missing data"
        raise ClipError(RejectionClass.CORRUPT_FRAMES, "decode", message) from error
    except av.error.FFmpegError as error:
        raise ClipError(RejectionClass.DECODE_FAILED, "decode", f"libav: {error.strerror}") from error


def _repeats_the_picture(packet: Packet) -> bool:
    """Whether it is an empty packet, which Theora and AVI use for "the picture stays".

    No frame is lost: the one before stays on screen until the next. (libav refuses it as an invalid argument. The
    packet that ends the demuxer's work, which is empty too, has no time and must reach the decoder.)
    """
    return packet.size == 0 and packet.dts is not None


def _is_picture(stream: VideoStream) -> bool:
    return bool(stream.disposition & Disposition.attached_pic)


def _video_stream(container: InputContainer) -> VideoStream:
    """The first video stream that is not cover art."""
    for stream in container.streams.video:
        if not _is_picture(stream):
            if stream.codec_context is None:  # PyAV's stubs say that there is always one
                message = "libav has no decoder for the video stream's codec"
                raise ClipError(RejectionClass.DECODE_FAILED, "decode", message)
            if stream.codec_context.width == 0:  # libav takes back a declared size over max_pixels
                message = f"the video stream declares no frame size, or more than {MAX_FRAME_PIXELS} pixels"
                raise ClipError(RejectionClass.NO_FRAMES, "decode", message)
            return stream
    raise ClipError(RejectionClass.NO_VIDEO_STREAM, "decode", "the container has no video stream")


def _orientation(frame: VideoFrame) -> Orientation:
    matrix = frame.side_data.get("DISPLAYMATRIX")
    return Orientation() if matrix is None else Orientation.from_matrix(struct.unpack("<9i", bytes(matrix)))


def _presented(frame: VideoFrame, number: int) -> Fraction:
    if frame.pts is None or frame.time_base is None:
        raise ClipError(RejectionClass.DECODE_FAILED, "decode", f"frame {number} has no presentation time")
    return frame.pts * frame.time_base


def _describe(
    container: InputContainer, stream: VideoStream, frame: VideoFrame, orientation: Orientation
) -> SourceVideo:
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = frame.width, frame.height
    if orientation.swaps_sides:
        width, height, aspect = height, width, 1 / aspect
    rate = stream.average_rate or stream.guessed_rate
    if stream.duration is not None and stream.time_base is not None:
        duration = float(stream.duration * stream.time_base)
    else:
        duration = None if container.duration is None else container.duration / av.time_base
    return SourceVideo(
        width=width,
        height=height,
        sample_aspect_ratio=float(aspect),
        rotation=orientation.degrees_clockwise,
        fps=float(rate) if rate else None,
        duration=duration,
        codec=stream.codec_context.codec.canonical_name,
        decoder=DECODER,
    )
