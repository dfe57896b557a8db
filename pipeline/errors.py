"""Every error this project raises on purpose.

    PipelineError
    ├── ConfigError            what the user asked for is impossible or unclear        (also a ValueError)
    ├── SourceError            the input as a whole cannot be read as described
    │   └── SourceChanged      an input differs from what its receipt was made from
    ├── StorageError           a store refused, or cannot promise what the commit needs
    ├── IdentityMismatch       the output belongs to another fingerprint or format
    ├── DatasetError           what is stored is not what its receipt says
    ├── ShardError             one shard cannot be finished; carries the shard id
    │   └── PoisonShard        it ended its encode actor too often
    ├── ErrorBudgetExceeded    too large a share of the samples was rejected
    └── ClipError              one clip or window is refused; becomes a Rejection

A ClipError never leaves the per-clip boundary: it is data (`Rejection`), not a failure of the run.
"""

from __future__ import annotations

from enum import StrEnum


class RejectionClass(StrEnum):
    """Why a clip, a window or the rest of a shard was refused. Stable names: receipts store them."""

    UPSTREAM_FAILED = "upstream_failed"  # the downloader says so itself: outside any error budget
    NO_VIDEO = "no_video"  # a sample without a member that could be a video
    MISSING_FILE = "missing_file"  # a table row whose file is not there
    BAD_METADATA = "bad_metadata"  # the sample's json is not a JSON object
    BAD_CAPTION = "bad_caption"  # the caption is not UTF-8
    UNSAFE_KEY = "unsafe_key"  # a key that must not become a file name
    DUPLICATE_KEY = "duplicate_key"
    TOO_LARGE = "too_large"  # more bytes than decode.max_clip_bytes
    TRUNCATED_SHARD = "truncated_shard"  # the tar ends or breaks in the middle; scope "shard"
    UNSUPPORTED_CONTAINER = "unsupported_container"
    NO_VIDEO_STREAM = "no_video_stream"
    NO_FRAMES = "no_frames"
    DECODE_FAILED = "decode_failed"
    CORRUPT_FRAMES = "corrupt_frames"
    RESOLUTION_CHANGED = "resolution_changed"
    TOO_SHORT = "too_short"
    TOO_SMALL = "too_small"
    TIMEOUT = "timeout"
    OUT_OF_MEMORY = "out_of_memory"
    DECODER_CRASHED = "decoder_crashed"
    NON_FINITE = "non_finite"  # NaN or Inf after the cast to the storage dtype; scope "window"


class PipelineError(Exception):
    """Root of the tree."""


class ConfigError(PipelineError, ValueError):
    """What the user asked for is impossible or unclear; the message says expected, got and where."""


class SourceError(PipelineError):
    """An input cannot be read as described."""


class SourceChanged(SourceError):
    """An input's size or ETag differs from the one its receipt was made from."""


class StorageError(PipelineError):
    """A store refused an operation, or cannot promise what the commit protocol needs."""


class IdentityMismatch(PipelineError):
    """The output directory belongs to another fingerprint, format or format version."""


class DatasetError(PipelineError):
    """A stored object is not what its receipt, index or manifest says."""


class ShardError(PipelineError):
    """One shard cannot be finished."""

    def __init__(self, shard_id: str, message: str) -> None:
        super().__init__(f"shard {shard_id}: {message}")
        self.shard_id = shard_id
        self.message = message

    def __reduce__(self) -> tuple[type[ShardError], tuple[str, str]]:
        return type(self), (self.shard_id, self.message)  # survives the trip from an actor to the driver


class PoisonShard(ShardError):
    """A shard ended its encode actor too often to be tried again."""


class ErrorBudgetExceeded(PipelineError):
    """Too large a share of a run's samples was rejected; what is committed stays."""


class ClipError(PipelineError):
    """One clip or window is refused. Raised and caught inside the per-clip boundary only."""

    def __init__(self, error_class: RejectionClass, stage: str, message: str) -> None:
        super().__init__(f"{stage}: {error_class.value}: {message}")
        self.error_class = error_class
        self.stage = stage
        self.message = message
