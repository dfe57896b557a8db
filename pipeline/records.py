"""The nouns of the dataflow, from an input shard to a stored latent.

Layouts: frames_THWC uint8 RGB; latents (C, T, H, W). Times are seconds from the first frame's presentation.
What is written to disk as JSON (`ShardReceipt`, `Manifest`, `RunIdentity`) lives in `documents.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ClipError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from pipeline.decode.blob import Blob


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoShard:
    """One unit of work: an input tar, or a span of a table's rows. Its output shard has the same id."""

    id: str
    kind: Literal["webdataset", "table"]
    url: str
    size: int | None = None
    """Bytes of the source object."""
    etag: str | None = None
    """The store's version tag, where it has one."""
    rows: tuple[int, int] | None = None
    """Half-open span of table rows; None for a tar."""
    byte_span: tuple[int, int] | None = None
    """Half-open byte span of those rows in a CSV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """One source sample whose bytes are in hand."""

    key: str
    shard_id: str
    video: Blob
    video_sha256: str
    file_name: str
    """Member name in the tar, or the table's uri."""
    caption: str
    metadata: dict[str, Any]
    """All of the source's own metadata, JSON types only."""

    @property
    def pair_sha256(self) -> str:
        """Hash that ties key, video bytes and caption together."""
        return pair_sha256(self.key, self.video_sha256, self.caption)


def pair_sha256(key: str, video_sha256: str, caption: str) -> str:
    """sha256 over the length-prefixed UTF-8 of key, the video's sha256 hex digest and the caption."""
    digest = hashlib.sha256()
    for part in (key, video_sha256, caption):
        encoded = part.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceVideo:
    """What the container says and what decoding found. Sizes in display orientation, square pixels applied
    only by the resize: `width` x `height` are stored pixels after rotation."""

    width: int
    height: int
    sample_aspect_ratio: float
    """Width of a stored pixel over its height, after rotation; 1.0 where unknown."""
    rotation: int
    """Degrees clockwise the stored frame was turned for display: 0, 90, 180 or 270."""
    fps: float | None
    """The container's average frame rate; None where it has none."""
    duration: float | None
    """Seconds, as the container says."""
    codec: str
    decoder: str
    """The backend that read the frames, with its version: "pyav-18.1.0"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A span of a clip's frames, decoded and resized: what is encoded and stored as one latent."""

    clip_key: str
    index: int
    frames_THWC: np.ndarray
    """uint8 RGB, may be read-only."""
    frame_indices: tuple[int, ...]
    """Per frame, its number among the clip's decoded frames, in presentation order."""
    frame_times: tuple[float, ...]
    """Per frame, its presentation time: seconds from the clip's first frame."""
    fps: float | None
    """Nominal rate of the window's frames: the policy's or the source's over frame_stride."""
    crop: tuple[float, float, float, float]
    """(x, y, width, height) of the kept area in display-oriented stored pixels."""
    source: SourceVideo
    padded_frames: int = 0
    """Copies of the last real frame at the end (tail policy pad)."""
    trimmed_frames: int = 0
    """Sampled frames of the tail cut off after this window (tail policy trim)."""

    @property
    def key(self) -> str:
        return f"{self.clip_key}_{self.index:05d}"

    @property
    def shape(self) -> tuple[int, int, int]:
        """(T, H, W): the bucket."""
        time, height, width, _ = self.frames_THWC.shape
        return time, height, width


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejection:
    """A clip, a window or the rest of a shard that was refused. Data, stored in the receipt."""

    key: str
    shard_id: str
    scope: Literal["clip", "window", "shard"]
    stage: str
    error_class: str
    message: str

    @classmethod
    def from_error(
        cls, error: ClipError, *, key: str, shard_id: str, scope: Literal["clip", "window", "shard"] = "clip"
    ) -> Rejection:
        return cls(
            key=printable(key),
            shard_id=shard_id,
            scope=scope,
            stage=error.stage,
            error_class=error.error_class.value,
            message=printable(error.message)[:500],
        )


def printable(text: str) -> str:
    """The text with undecodable bytes shown as \\xNN, so that it can be stored in UTF-8."""
    shown = (f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text)
    return "".join(shown).encode("utf-8", "backslashreplace").decode("utf-8")


def bucket_name(time: int, height: int, width: int) -> str:
    """ "00017x0256x0256": sorts by size."""
    return f"{time:05d}x{height:05d}x{width:05d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentRow:
    """Everything about a stored window but its numbers: one row of the index."""

    key: str
    clip_key: str
    window_index: int
    shard_id: str
    num_frames: int
    height: int
    width: int
    latent_shape: tuple[int, int, int, int]
    """(C, T, H, W)"""
    latent_dtype: str
    has_logvar: bool
    caption: str
    file_name: str
    fps: float | None
    duration_sec: float
    """Last frame time less the first, plus one nominal frame."""
    frame_indices: tuple[int, ...]
    frame_times: tuple[float, ...]
    padded_frames: int
    trimmed_frames: int
    crop: tuple[float, float, float, float]
    source: SourceVideo
    pair_sha256: str
    video_sha256: str
    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        window: Window,
        clip: Clip,
        *,
        latent_shape: tuple[int, int, int, int],
        latent_dtype: str,
        has_logvar: bool,
    ) -> LatentRow:
        """The row of a clip's window."""
        num_frames, height, width = window.shape
        step = 1.0 / window.fps if window.fps else 0.0
        return cls(
            key=window.key,
            clip_key=clip.key,
            window_index=window.index,
            shard_id=clip.shard_id,
            num_frames=num_frames,
            height=height,
            width=width,
            latent_shape=latent_shape,
            latent_dtype=latent_dtype,
            has_logvar=has_logvar,
            caption=clip.caption,
            file_name=clip.file_name,
            fps=window.fps,
            duration_sec=window.frame_times[-1] - window.frame_times[0] + step,
            frame_indices=window.frame_indices,
            frame_times=window.frame_times,
            padded_frames=window.padded_frames,
            trimmed_frames=window.trimmed_frames,
            crop=window.crop,
            source=window.source,
            pair_sha256=clip.pair_sha256,
            video_sha256=clip.video_sha256,
            metadata=clip.metadata,
        )

    @property
    def bucket(self) -> str:
        return bucket_name(self.num_frames, self.height, self.width)

    @property
    def sort_key(self) -> tuple[str, str]:
        """Rows of a shard are stored in this order, so that a batch of one shape is one read."""
        return self.bucket, self.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """A window's record: the raw posterior mean (and log variance) with its row."""

    row: LatentRow
    mean_CTHW: torch.Tensor
    logvar_CTHW: torch.Tensor | None = None
    """In the row's dtype, or int8 in the code of logvar_code.py."""
