"""Rows and receipts to totals: the manifest, the dataset card."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    for receipt in receipts:
        receipt.counts.check(f"receipt of shard {receipt.shard_id}")
        counts = counts.plus(receipt.counts)
        statistics = statistics.merge(receipt.statistics)
        buckets.update(receipt.buckets)
        rejections.update(receipt.rejected_by_class())
        decoders.update(receipt.decoders)
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
    )


def dataset_card(manifest: Manifest) -> str:
    """README.md of a dataset: a Hugging Face card whose YAML header names the data files."""
    pattern = "shards/*.tar" if manifest.format == "webdataset" else "shards/*.parquet"
    identity, counts, vae = manifest.identity, manifest.counts, manifest.identity.vae
    buckets = "\n".join(f"| {name} | {rows} |" for name, rows in manifest.buckets.items()) or "| none | 0 |"
    rejected = "\n".join(f"| {name} | {number} |" for name, number in manifest.rejections.items()) or "| none | 0 |"
    stored = "raw posterior mean" + (" and log variance" if identity.logvar else "")
    stored += " (int8: (code / 8) - 8)" if identity.logvar == "int8" else ""
    channels = "\n".join(
        f"| {index} | {mean:.5f} | {std:.5f} |"
        for index, (mean, std) in enumerate(zip(manifest.latent_mean, manifest.latent_std, strict=True))
    )
    return f"""---
configs:
- config_name: default
  data_files: "{pattern}"
tags:
- video-latents
---

# Video latents

{counts.windows_stored} windows of {counts.clips_encoded} clips in {len(manifest.shards)} shards,
{manifest.payload_bytes} bytes, format {manifest.format} version {manifest.format_version}.

- VAE: {vae.get("name")}, weights sha256 `{identity.weights_sha256}`
- identity: `{manifest.fingerprint}`
- stored: {stored}, {identity.storage_dtype}, layout C, T, H, W
- normalize: {_normalization(vae)}

| bucket (frames x height x width) | windows |
|---|---|
{buckets}

| rejected, by class | samples |
|---|---|
{rejected}

| channel | mean | std |
|---|---|---|
{channels}
"""


def _normalization(vae: Mapping[str, Any]) -> str:
    shift, scale = vae.get("shift_factor"), vae.get("scaling_factor")
    if isinstance(shift, list) or isinstance(scale, list):
        return f"z = (mean - shift) * scale, by channel: shift {shift}, scale {scale}"
    return f"z = (mean - {shift}) * {scale}"
