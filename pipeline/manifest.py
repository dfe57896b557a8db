"""Rows and receipts to totals: the manifest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from pipeline.documents import Counts, Manifest, ManifestShard, RunFile, ShardReceipt
from pipeline.records import LatentRow
from pipeline.stats import ChannelStatistics


def rows_per_bucket(rows: Iterable[LatentRow]) -> dict[str, int]:
    return dict(sorted(Counter(row.bucket for row in rows).items()))


def rows_per_decoder(rows: Iterable[LatentRow]) -> dict[str, int]:
    return dict(sorted(Counter(row.source.decoder for row in rows).items()))


def build_manifest(run: RunFile, receipts: Iterable[ShardReceipt], set_aside: Sequence[str]) -> Manifest:
    """Totals over receipts that come in shard-id order (statistics merge in that order)."""
    counts, statistics = Counts(), ChannelStatistics()
    buckets: Counter[str] = Counter()
    rejections: Counter[str] = Counter()
    decoders: Counter[str] = Counter()
    shards: list[ManifestShard] = []
    not_proven = 0
    for receipt in receipts:
        receipt.counts.check(f"receipt of shard {receipt.shard_id}")
        counts = counts.plus(receipt.counts)
        statistics = statistics.merge(receipt.statistics)
        buckets.update(receipt.buckets)
        rejections.update(receipt.rejected_by_class())
        decoders.update(receipt.decoders)
        not_proven += receipt.tile_proof.windows_out_of_memory if receipt.tile_proof else 0
        shards.append(
            ManifestShard(
                id=receipt.shard_id,
                size=receipt.payload.size,
                sha256=receipt.payload.sha256,
                rows=receipt.buckets,
            )
        )
    return Manifest(
        fingerprint=run.fingerprint,
        identity=run.identity,
        format=run.format,
        shards=tuple(shards),
        set_aside=tuple(set_aside),
        counts=counts,
        buckets=dict(sorted(buckets.items())),
        rejections=dict(sorted(rejections.items())),
        decoders=dict(sorted(decoders.items())),
        statistics=statistics,
        latent_mean=statistics.mean,
        latent_std=statistics.std,
        payload_bytes=sum(shard.size for shard in shards),
        windows_not_proven=not_proven,
    )
