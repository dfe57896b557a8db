"""The JSON documents of a dataset: identity, run.json, receipts, manifest. docs/format.md describes them.

All are written canonically (sorted keys, two-space indent, a newline at the end, shortest float repr), so that
equal content means equal bytes. None holds a time, a host, a process id, an attempt count or a rate: those go to
runs/ID.json, the one file that may differ between two runs over the same input.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import DatasetError
from pipeline.policies import DTypeName, FormatName, ResizePolicy, WindowPolicy
from pipeline.stats import ChannelStatistics

FORMAT_VERSION = 1

DocumentType = TypeVar("DocumentType", bound="Document")


class Document(BaseModel):
    """A frozen JSON document."""

    # "constants": NaN in a free-form field must reach `canonical_json`, which refuses it, and not become null
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    def to_bytes(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))

    @classmethod
    def from_bytes(cls: type[DocumentType], data: bytes, where: str) -> DocumentType:
        """Parse; DatasetError names `where` and what is wrong."""
        try:
            raw = json.loads(data, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise DatasetError(f"{where}: not JSON: {error}") from error
        version = raw.get("format_version") if isinstance(raw, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise DatasetError(
                f"{where}: expected format_version at most {FORMAT_VERSION}, got {version}: "
                "it was written by a newer release"
            )
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            raise DatasetError(f"{where}: not a valid {cls.__name__}: {error}") from error


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON whose bytes are a function of the value alone. NaN and Inf are refused (ValueError)."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


class RunIdentity(Document):
    """What decides which numbers are meant. Two runs with one fingerprint may share an output directory."""

    weights_sha256: str
    vae: dict[str, Any]
    """The VAE's spec: strides, channels, tile plan, value range, scale and shift."""
    windows: WindowPolicy
    resize: ResizePolicy
    decode_backends: tuple[str, ...]
    compute_dtype: DTypeName
    storage_dtype: DTypeName
    logvar: bool | Literal["int8"]
    """Whether log variances are stored; "int8": in the code of logvar_code.py."""

    @property
    def logvar_dtype(self) -> str:
        """Of the stored log variances, where there are some."""
        return "int8" if self.logvar == "int8" else self.storage_dtype

    @property
    def fingerprint(self) -> str:
        """sha256 over the canonical JSON, in hex."""
        return hashlib.sha256(self.to_bytes()).hexdigest()


class RunFile(Document):
    """run.json: created first, only if absent; everything in OUT belongs to it."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    identity: RunIdentity
    format: FormatName
    source: dict[str, Any]
    """The source section of the config, and the sha256 of a table."""
    config: dict[str, Any]
    """The whole resolved config of the run that created the directory. Holds no secrets: none are allowed in it."""


class SourceRecord(Document):
    """The input a receipt was made from."""

    url: str
    kind: Literal["webdataset", "table"]
    size: int | None
    etag: str | None
    sha256: str | None
    """Of the whole tar; None for a span of a table."""
    rows: tuple[int, int] | None
    byte_span: tuple[int, int] | None


class StoredObject(Document):
    """An object under OUT."""

    path: str
    size: int
    sha256: str


class RejectionRecord(Document):
    key: str
    scope: Literal["clip", "window", "shard"]
    stage: str
    error_class: str
    message: str


class Counts(Document):
    """samples = clips_encoded + clips_rejected; windows_decoded = windows_stored + windows_rejected."""

    samples: int = 0
    clips_encoded: int = 0
    clips_rejected: int = 0
    windows_decoded: int = 0
    windows_stored: int = 0
    windows_rejected: int = 0
    frames_decoded: int = 0
    """Frames that came out of the codec for encoded clips."""
    frames_sampled: int = 0
    """Of those, the ones that fps and frame_stride select."""
    frames_stored: int = 0
    """Frames in stored windows, padding included; overlapping windows count a frame more than once."""
    frames_padded: int = 0
    frames_dropped_tail: int = 0
    """Sampled frames of a tail that was dropped or trimmed."""
    frames_unused: int = 0
    """Sampled frames in the gaps that a window_stride above the window's length leaves."""
    clips_cut_short: int = 0
    """Encoded clips of which max_windows left a rest; its frames were not decoded and are in no count."""

    def check(self, where: str) -> None:
        """DatasetError if the counts do not add up."""
        if self.samples != self.clips_encoded + self.clips_rejected:
            raise DatasetError(
                f"{where}: {self.samples} samples but {self.clips_encoded} clips encoded "
                f"and {self.clips_rejected} rejected"
            )
        if self.windows_decoded != self.windows_stored + self.windows_rejected:
            raise DatasetError(
                f"{where}: {self.windows_decoded} windows decoded but {self.windows_stored} stored "
                f"and {self.windows_rejected} rejected"
            )

    def plus(self, other: Counts) -> Counts:
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in type(self).model_fields})


class TileProof(Document):
    """How far the stored latents of the proved windows were from two references, before the cast to the storage
    dtype: the worst window counts. pipeline/tile_proof.py says what the references are."""

    windows: int
    alone_largest: float | None
    """Absolute difference from the window encoded by itself; None if that fitted for no window."""
    alone_relative_rms: float | None
    windows_of_many_tiles: int
    """Of `windows`, those that were compared with one pass without tiles in time, too."""
    untiled_largest: float | None
    untiled_relative_rms: float | None
    windows_out_of_memory: int = 0
    """Chosen windows that are not proven, or only by themselves: a reference did not fit in the device's memory."""


class ShardReceipt(Document):
    """receipts/ID.json: proof that a shard is committed. Written once, after the objects it describes."""

    format_version: int = FORMAT_VERSION
    shard_id: str
    fingerprint: str
    source: SourceRecord
    payload: StoredObject
    index: StoredObject
    numerics: dict[str, Any]
    counts: Counts
    buckets: dict[str, int]
    """Rows per bucket."""
    decoders: dict[str, int]
    """Stored windows per decoder that read them."""
    statistics: ChannelStatistics
    """Of the stored means, in row order."""
    rejections: tuple[RejectionRecord, ...]
    tile_proof: TileProof | None = None
    """Only in receipts of runs with encode.proof_share."""

    def to_bytes(self) -> bytes:
        """Without a proof the receipt does not speak of one: it is what it was before there were any."""
        return canonical_json(
            self.model_dump(mode="json", exclude={"tile_proof"} if self.tile_proof is None else None)
        )

    def rejected_by_class(self) -> dict[str, int]:
        """Number of rejections per class, all scopes."""
        totals: dict[str, int] = {}
        for rejection in self.rejections:
            totals[rejection.error_class] = totals.get(rejection.error_class, 0) + 1
        return totals


class ManifestShard(Document):
    """A shard's line in the manifest."""

    id: str
    size: int
    sha256: str
    rows: dict[str, int]
    """Per bucket."""


class Manifest(Document):
    """manifest.json: written last; a dataset without it is unfinished."""

    format_version: int = FORMAT_VERSION
    fingerprint: str
    identity: RunIdentity
    format: FormatName
    shards: tuple[ManifestShard, ...]
    """In shard-id order."""
    set_aside: tuple[str, ...]
    """Ids of shards that ended their encode actor too often and were set aside by config."""
    counts: Counts
    buckets: dict[str, int]
    rejections: dict[str, int]
    """Per class."""
    decoders: dict[str, int]
    statistics: ChannelStatistics
    latent_mean: tuple[float, ...]
    """Per channel, over all stored raw means."""
    latent_std: tuple[float, ...]
    payload_bytes: int
    windows_not_proven: int = 0
    """Of the windows that encode.proof_share chose: those with a reference that ran out of memory."""

    def to_bytes(self) -> bytes:
        """Where nothing is to be said of a proof, nothing is said."""
        return canonical_json(
            self.model_dump(mode="json", exclude=None if self.windows_not_proven else {"windows_not_proven"})
        )
