"""What an encode actor does in a simulation: the time that a shard takes, and objects that are small but real."""

from __future__ import annotations

import hashlib
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.dataset import index_name, shard_name
from pipeline.documents import Counts, RejectionRecord, ShardReceipt, SourceRecord, StoredObject
from pipeline.formats import FORMATS
from pipeline.records import VideoShard
from pipeline.shard import ShardJob, ShardStored
from pipeline.stats import ChannelStatistics
from pipeline.storage import ObjectInfo, Store

CHANNELS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardLoad:
    """What one simulated shard costs and holds."""

    lead_seconds: float = 0.0
    """Reading and decoding before the VAE has something to do; overlaps another shard's encoding."""
    encode_seconds: float = 0.0
    """Time the VAE is held; one shard of an actor at a time."""
    clips: int = 107
    failed_clips: int = 3
    """Of `clips`; each is a rejection in the receipt."""
    windows_per_clip: int = 4
    payload_bytes: int = 4096
    index_bytes: int = 1024


@dataclass(slots=True)
class TimedRunner:
    """A `pipeline.dataflow.ShardRunner` that sleeps where the real one computes, and stores as the real one does."""

    job: ShardJob
    load: ShardLoad
    _vae: threading.Lock = field(default_factory=threading.Lock)
    _done: int = 0

    def run(self, shard: VideoShard) -> ShardStored:
        started = time.monotonic()
        if self.load.lead_seconds:
            time.sleep(self.load.lead_seconds)
        with self._vae:
            if self.load.encode_seconds:
                time.sleep(self.load.encode_seconds)
            self._done += 1
        suffix = FORMATS[self.job.format].suffix
        payload = self._store(shard_name(shard.id, suffix), self.load.payload_bytes)
        index = self._store(index_name(shard.id), self.load.index_bytes)
        receipt = receipt_of(shard, self.job.identity.fingerprint, self.load, payload, index)
        return ShardStored(shard_id=shard.id, receipt=receipt, seconds={"simulated": time.monotonic() - started})

    def figures(self) -> dict[str, float]:
        return {"window_frames": float(self._done)}

    def _store(self, name: str, size: int) -> StoredObject:
        content = content_of(name, size)
        self.job.store.create(name, content)
        return StoredObject(path=name, size=size, sha256=hashlib.sha256(content).hexdigest())


class DistantStore(Store):
    """A store whose every request takes longer by a fixed time, as one behind a network does."""

    def __init__(self, near: Store, request_seconds: float) -> None:
        super().__init__(near.url, options=near.options, single_driver=near.single_driver)
        self._near = near
        self._request_seconds = request_seconds

    def __reduce__(self) -> tuple[Any, ...]:
        return DistantStore, (self._near, self._request_seconds)

    def info(self, name: str) -> ObjectInfo | None:
        time.sleep(self._request_seconds)
        return super().info(name)

    def create(self, name: str, content: bytes | Path) -> bool:
        time.sleep(self._request_seconds)
        return super().create(name, content)


def set_up_of(job: ShardJob, load: ShardLoad) -> partial[TimedRunner]:
    return partial(TimedRunner, job, load)


def content_of(name: str, size: int) -> bytes:
    """Bytes that depend on the name alone, as a real payload depends on the shard alone."""
    return hashlib.shake_128(name.encode()).digest(size)


def receipt_of(
    shard: VideoShard, fingerprint: str, load: ShardLoad, payload: StoredObject, index: StoredObject
) -> ShardReceipt:
    """A receipt of the size and the shape of a real one; its counts add up."""
    encoded = load.clips - load.failed_clips
    windows = encoded * load.windows_per_clip
    noise = hashlib.shake_128(shard.id.encode()).digest(6 * CHANNELS)
    spread = tuple(int.from_bytes(noise[start : start + 6], "big") for start in range(0, len(noise), 6))
    return ShardReceipt(
        shard_id=shard.id,
        fingerprint=fingerprint,
        source=SourceRecord(
            url=shard.url,
            kind=shard.kind,
            size=shard.size,
            etag=shard.etag,
            sha256=hashlib.sha256(shard.id.encode()).hexdigest(),
            rows=None,
            byte_span=None,
        ),
        payload=payload,
        index=index,
        numerics={
            "batch_shape": [16, 17, 256, 256],
            "device": "simulated",
            "libraries": {"numpy": "2.4.6", "torch": "2.13.0", "webdataset": "1.0.2"},
            "threads": 1,
        },
        counts=Counts(
            samples=load.clips,
            clips_encoded=encoded,
            clips_rejected=load.failed_clips,
            windows_decoded=windows,
            windows_stored=windows,
            frames_decoded=windows * 33,
            frames_sampled=windows * 33,
            frames_stored=windows * 33,
        ),
        buckets={"00017x00256x00256": encoded, "00033x00256x00256": windows - encoded},
        decoders={"pyav-18.1.0": windows},
        statistics=ChannelStatistics(
            count=max(1, windows) * 9 * 32 * 32,
            mean=tuple(value / 2**48 for value in spread),
            m2=tuple(value / 2**20 for value in spread),
            minimum=(-4.5,) * CHANNELS,
            maximum=(4.75,) * CHANNELS,
        ),
        rejections=tuple(
            RejectionRecord(
                key=f"{shard.id}{number:04d}",
                scope="clip",
                stage="read",
                error_class="upstream_failed",
                message="status 'failed_to_download': 'HTTP Error 404: Not Found'",
            )
            for number in range(load.failed_clips)
        ),
    )
