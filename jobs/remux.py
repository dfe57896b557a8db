"""Cutting a video at its keyframes without re-encoding: packets are copied into a new mp4, as clip cutters do.

The bytes depend on the input and the version of PyAV's ffmpeg only: no time, no random id, no encoder string.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import av
from av.container import OutputContainer
from av.packet import Packet
from av.stream import Stream

_TIME_TOLERANCE = 0.005
"""Seconds. Keyframe times are given rounded; frames are further apart than this."""


def copy_span(
    path: Path,
    *,
    start: float = 0.0,
    stop: float = math.inf,
    max_packets: int | None = None,
    kind: Literal["video", "audio"] = "video",
) -> bytes:
    """An mp4, its index first, that holds the packets of one stream from a keyframe up to another.

    `start` and `stop` are presentation times of keyframes in seconds; 0 is the first keyframe whatever its time (an
    edit list may put it before zero). Sound is left out of a video's copy. ValueError if the file has no such
    stream, or no keyframe at `start`. `max_packets` ends the copy early, in decoding order: 1 is a still.
    """
    with av.open(str(path)) as source, tempfile.TemporaryDirectory() as folder:
        stream = next((stream for stream in source.streams if stream.type == kind), None)
        if stream is None:
            raise ValueError(f"{path.name}: expected a stream of kind {kind!r}, there is none")
        packets = list(itertools.islice(_span(source.demux(stream), start, stop), max_packets))
        if not packets or (start and _seconds(packets[0]) > start + _TIME_TOLERANCE):
            raise ValueError(f"{path.name}: expected a keyframe at {start} s, there is none")
        copy = Path(folder) / "copy.mp4"  # a real file: putting the index first means reading back what was written
        options = {"fflags": "+bitexact", "movflags": "+faststart"}
        with av.open(str(copy), mode="w", format="mp4", options=options) as target:
            _mux(packets, target.add_stream_from_template(stream), target)
        return copy.read_bytes()


def _seconds(packet: Packet) -> float:
    assert packet.pts is not None, "packets of an mp4 have presentation times"
    return float(packet.pts * packet.time_base)


def _span(packets: Iterator[Packet], start: float, stop: float) -> Iterator[Packet]:
    """In decode order: from the first keyframe at `start` or later to before the one at `stop`."""
    inside = start == 0.0
    for packet in packets:
        if packet.size == 0:
            return  # demux ends with an empty packet, to flush a decoder
        if packet.is_keyframe:
            inside = inside or _seconds(packet) >= start - _TIME_TOLERANCE
            if _seconds(packet) >= stop - _TIME_TOLERANCE:
                return
        if inside:
            yield packet


def _mux(packets: list[Packet], stream: Stream, target: OutputContainer) -> None:
    """Write the packets so that the first one is shown at zero."""
    shift = packets[0].pts or 0
    for packet in packets:
        assert packet.pts is not None, "packets of an mp4 have presentation times"
        assert packet.dts is not None, "packets of an mp4 have decoding times"
        packet.pts -= shift
        packet.dts -= shift
        packet.stream = stream
        target.mux(packet)
