"""What a decoder gives: a clip's frames in presentation order, with what the container says about them.

Two backends read them. PyAV (`pyav_backend.py`) is strict and the one to trust. decord (`decord_backend.py`) is the
fallback for what PyAV's libav cannot decode; it cannot be told to refuse damage it can hide, so it never gets a
clip in which PyAV found damage.

What is found, never concealed: damage the codec notices (libav's err_detect=explode), packets cut short, frames
libav marks as corrupt, the missing end of an MP4, AVI, FLV, MPEG, Matroska or WebM file, a frame size that changes
midway, presentation times that go backwards. What no decoder finds: a flipped bit that leaves a valid bitstream
(about a quarter of single flips in H.264 and HEVC), and an Ogg file, a transport stream or a WebM file of unstated
size that ends between two packets.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, Self

from pipeline.decode.container import check_container
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import BackendName

if TYPE_CHECKING:
    import numpy as np

    from pipeline.records import SourceVideo

_MODULES: dict[BackendName, str] = {"pyav": "av", "decord": "decord"}


@dataclass(frozen=True, slots=True)
class SourceFrame:
    """One decoded frame. `rgb()` converts it, so that frames nobody wants cost no conversion."""

    number: int
    """Its place among the decoded frames, in presentation order, from 0."""
    time: float
    """Presentation time in seconds from the first frame; never less than the frame before."""
    rgb: Callable[[], np.ndarray]
    """() -> (H, W, 3) uint8 RGB in display orientation."""


class FrameSource(Protocol):
    """An open clip. Iterate it once; errors are ClipError."""

    video: SourceVideo

    def __iter__(self) -> Iterator[SourceFrame]: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


def open_frames(path: str, backend: BackendName, *, threads: int = 1) -> FrameSource:
    """Open the clip at `path` (also /dev/fd/N). ClipError if it is not a readable video."""
    check_container(path)
    try:
        if backend == "pyav":
            from pipeline.decode.pyav_backend import PyAvFrames

            return PyAvFrames(path, threads=threads)
        from pipeline.decode.decord_backend import DecordFrames

        return DecordFrames(path, threads=threads)
    except ImportError as error:
        raise ClipError(RejectionClass.DECODE_FAILED, "decode", f"{backend} cannot be imported: {error}") from error


def decoder_name(backend: BackendName) -> str | None:
    """ "pyav-18.1.0", as `SourceVideo.decoder` says it, or None where the backend is not installed."""
    try:
        return f"{backend}-{importlib.import_module(_MODULES[backend]).__version__}"
    except ImportError:
        return None
