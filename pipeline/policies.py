"""What a run does to a video, as frozen data: the parts of a config that the pipeline itself reads.

These models are the config's sections, the decode child's instructions and the identity's fields at once, so
that a setting has one name everywhere. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

DTypeName = Literal["float32", "bfloat16", "float16"]
FormatName = Literal["webdataset", "parquet"]
BackendName = Literal["pyav", "decord"]


_SECRET_NAME = re.compile(r"secret|token|passw|credential|(^|_)key$|sas|connection_string", re.IGNORECASE)
_SECRET_URL = re.compile(r"://[^/@\s]*:[^/@\s]*@|https?://[^/@\s]+@", re.IGNORECASE)
_SIGNED_URL = re.compile(
    r"://.*[?&](x-amz-|x-goog-)?(signature|security-token|sig|token|access_token)=", re.IGNORECASE
)


def refuse_secrets(value: Any, name: str = "") -> Any:
    """ValueError if a setting looks like a credential: configs are stored in run.json, so none may hold one."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if inner not in (None, False, True, "") and _SECRET_NAME.search(str(key)):
                raise ValueError(
                    f"{name}{key} looks like a credential; credentials come from the environment "
                    "(AWS_ACCESS_KEY_ID and so on) or the machine's role, never from a config"
                )
            refuse_secrets(inner, f"{name}{key}.")
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_secrets(inner, name)
    elif isinstance(value, str) and _SECRET_URL.search(value):
        raise ValueError("a URL with user:password in it; credentials come from the environment, never from a config")
    elif isinstance(value, str) and _SIGNED_URL.search(value):
        raise ValueError(
            "a signed URL holds a credential; credentials come from the environment, never from a config"
        )
    return value


def absolute_path(url: str) -> str:
    """A local path made absolute, for processes with another working directory; URLs stay as they are."""
    return url if "://" in url or "::" in url else os.path.abspath(os.path.expanduser(url))  # noqa: PTH100, PTH111


StoreOptions = Annotated[dict[str, Any], Field(default_factory=dict), AfterValidator(refuse_secrets)]
"""fsspec options that are no secrets, such as {"endpoint_url": ...}."""
PublicUrl = Annotated[str, AfterValidator(refuse_secrets), AfterValidator(absolute_path)]
"""A URL without credentials, or a local path."""


class Policy(BaseModel):
    """Frozen, strict about unknown keys. Its errors do not print what was given: that may be a refused secret."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        hide_input_in_errors=True,
        use_attribute_docstrings=True,  # the settings reference is made from them
    )


class WindowPolicy(Policy):
    """Which spans of a clip's frames become windows. Deterministic: a function of the decoded frames alone.

    Frames are first sampled (`fps`, then `frame_stride`), then cut into windows of `frames` every
    `window_stride` sampled frames. What is left after the last whole window is the tail.
    """

    frames: Annotated[int, Field(ge=1)] = 17
    """Frames in a window; must be a length that the VAE takes: 1 + 4k for most."""
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    """Resample to this rate by presentation time: output k shows the frame on screen at k / fps seconds
    after the first. None keeps every source frame."""
    frame_stride: Annotated[int, Field(ge=1)] = 1
    """Keep every n-th sampled frame."""
    window_stride: Annotated[int, Field(ge=1)] | None = None
    """Sampled frames from one window's start to the next; None means `frames` (no overlap)."""
    max_windows: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many windows of a clip; the rest is not decoded and is no rejection; the
    receipt counts such clips."""
    tail: Literal["drop", "pad", "trim"] = "drop"
    """drop: the tail is not encoded. pad: its last frame is repeated up to `frames`. trim: it is cut to the
    longest valid length. All three are recorded; a clip that yields no window at all is rejected too_short."""
    min_tail_frames: Annotated[int, Field(ge=1)] = 1
    """pad and trim only keep tails with at least this many real frames."""

    @property
    def stride(self) -> int:
        """Sampled frames between window starts."""
        return self.window_stride or self.frames


class ResizePolicy(Policy):
    """How a frame reaches a bucket's size: short side resized, centre cropped, in display orientation.

    The bucket nearest in aspect ratio (log scale) is chosen; among equals, the largest that needs no
    upscaling, else the smallest.
    """

    buckets: Annotated[tuple[tuple[int, int], ...], Field(min_length=1)] = ((256, 256),)
    """(height, width) pairs, multiples of the VAE's space stride."""
    filter: Literal["bilinear", "bicubic", "lanczos"] = "bicubic"
    """Pillow's antialiased resampling filter."""
    upscale: Literal["allow", "reject"] = "allow"
    """reject: a clip smaller than its bucket is rejected too_small."""

    @model_validator(mode="after")
    def _buckets_are_distinct(self) -> Self:
        if any(side < 1 for bucket in self.buckets for side in bucket):
            raise ValueError(f"buckets must have positive sides, got {self.buckets}")
        if len(set(self.buckets)) != len(self.buckets):
            raise ValueError(f"buckets must be distinct (height, width) pairs, got {self.buckets}")
        return self


class DecodePolicy(Policy):
    """How a clip's bytes become frames, and what a decode child may spend on one."""

    backends: Annotated[tuple[BackendName, ...], Field(min_length=1, max_length=2)] = ("pyav", "decord")
    """Tried in this order, per clip. A backend that is not installed is skipped with a warning at start."""
    cpu_seconds: Annotated[float, Field(gt=0)] = 60.0
    """CPU time a child may spend without finishing a window or a clip; wall time is limited to ten times that."""
    memory_mb: Annotated[int, Field(ge=128)] = 4096
    """Private memory (RSS less shared) of a child."""
    max_clip_bytes: Annotated[int, Field(ge=1)] = 2 << 30
    """A larger file is rejected too_large without being read to its end."""
    threads: Annotated[int, Field(ge=1)] = 1
    """Codec threads per child. More children scale better than more threads."""
    windows_in_flight: Annotated[int, Field(ge=1)] = 2
    """Decoded windows a child may have waiting."""

    @model_validator(mode="after")
    def _backends_are_distinct(self) -> Self:
        if len(set(self.backends)) != len(self.backends):
            raise ValueError(f"decode backends must be distinct, got {self.backends}")
        return self


class EncodePolicy(Policy):
    """How tiles become stored latents."""

    dtype: DTypeName = "float32"
    """Compute dtype of the VAE."""
    storage_dtype: DTypeName = "float16"
    """dtype of the stored moments."""
    logvar: bool | Literal["int8"] = False
    """Store the posterior's log variance beside its mean: in `storage_dtype`, or in one byte on a grid of 1/8, which
    changes the sampled standard deviation by at most 3.2 %."""
    batch_pixels: Annotated[int, Field(ge=1)] = 17 * 256 * 256
    """Frames x height x width of one batch: as many tiles of a bucket as fit are stacked, at least one. The default
    suits a CPU; a large GPU takes sixteen times as much."""
    memory_format: Literal["auto", "contiguous", "channels_last"] = "auto"
    """Memory layout of the VAE's activations and kernels; auto is channels_last."""
    compile: bool = False
    """torch.compile the tile encoder; one shape per bucket."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of an encoder without a GPU; None derives them from the cores an actor has."""
    proof_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the windows, chosen by their keys, that are encoded once more by themselves and once without tiles in
    time, to be compared with what is stored; the receipt says how far apart they are. Changes no stored latent. Off
    by default: each such window costs two more encodes, and memory for all its frames at once. 0.01 shows what is
    wrong."""
    proof_limit: Annotated[float, Field(gt=0)] = 0.05
    """Deviation (RMS of the difference over RMS of the latent) from the window encoded by itself above which the run
    stops. In float32 it is about 1e-6; a batch or a kernel that is wrong makes it about 1."""
    proof_untiled_limit: Annotated[float, Field(gt=0)] | None = None
    """The same limit against one pass without tiles. None: it is recorded and stops nothing, since how far tiles are
    from one pass is a property of the VAE."""
