"""Small documents for tests: an identity, a run file, a receipt, with any field changed."""

from __future__ import annotations

from typing import Any

from pipeline.documents import Counts, RejectionRecord, RunFile, RunIdentity, ShardReceipt, SourceRecord, StoredObject
from pipeline.policies import ResizePolicy, WindowPolicy
from pipeline.stats import ChannelStatistics


def identity(**changes: Any) -> RunIdentity:
    fields: dict[str, Any] = {
        "weights_sha256": "ab" * 32,
        "vae": {"name": "tiny", "scaling_factor": 0.18215, "shift_factor": 0.0},
        "windows": WindowPolicy(),
        "resize": ResizePolicy(buckets=((64, 64), (48, 96))),
        "decode_backends": ("pyav", "decord"),
        "compute_dtype": "float32",
        "storage_dtype": "float16",
        "logvar": False,
    }
    return RunIdentity(**fields | changes)


def run_file(**changes: Any) -> RunFile:
    one = identity()
    fields: dict[str, Any] = {
        "fingerprint": one.fingerprint,
        "identity": one,
        "format": "webdataset",
        "source": {"kind": "webdataset", "urls": ["s3://bucket/{0..9}.tar"], "table_sha256": None},
        "config": {"any": {"thing": [1, 2.5, None]}},
    }
    return RunFile(**fields | changes)


def receipt(shard_id: str = "00000", **changes: Any) -> ShardReceipt:
    fields: dict[str, Any] = {
        "shard_id": shard_id,
        "fingerprint": identity().fingerprint,
        "source": SourceRecord(
            url=f"s3://bucket/{shard_id}.tar",
            kind="webdataset",
            size=10240,
            etag="abc-2",
            sha256="cd" * 32,
            rows=None,
            byte_span=None,
        ),
        "payload": StoredObject(path=f"shards/{shard_id}.tar", size=100, sha256="ef" * 32),
        "index": StoredObject(path=f"index/{shard_id}.parquet", size=10, sha256="01" * 32),
        "numerics": {"device": "cpu", "threads": 1},
        "counts": Counts(samples=3, clips_encoded=2, clips_rejected=1, windows_decoded=5, windows_stored=5),
        "buckets": {"00017x00064x00064": 5},
        "decoders": {"pyav-18.1.0": 5},
        "statistics": ChannelStatistics(
            count=4, mean=(0.5, -1.0), m2=(1.0, 2.0), minimum=(0.0, -2.0), maximum=(1.0, 0.0)
        ),
        "rejections": (
            RejectionRecord(key="k☃", scope="clip", stage="read", error_class="no_video", message='a "message"\n'),
        ),
    }
    return ShardReceipt(**fields | changes)
