"""Whole datasets with documents, made without a VAE: what a reader may be given."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cvvae import SPECS, VAESpec
from pipeline.dataset import DatasetFolder, describe_file, index_name, shard_name
from pipeline.documents import Counts, Manifest, RunFile, ShardReceipt
from pipeline.formats import FORMATS, ShardHeader, write_index
from pipeline.manifest import build_manifest, rows_per_bucket
from pipeline.records import Latent
from pipeline.stats import ChannelStatistics
from pipeline.storage import Store
from tests.pipeline.example_documents import identity, receipt
from tests.pipeline.formats.made_latents import make_latent, stored_order

SMALL, LONG = (17, 16, 16), (33, 16, 32)


def latents_of(
    shard_id: str, sizes: Sequence[tuple[int, int, int]], *, dtype: str, logvar: bool | str
) -> list[Latent]:
    made = [
        make_latent(f"{shard_id}/clip{number:03d}_00000", dtype=dtype, logvar=logvar, size=size, shard_id=shard_id)
        for number, size in enumerate(sizes)
    ]
    return stored_order(made)


def run_of(
    *,
    format_name: str = "webdataset",
    dtype: str = "float16",
    logvar: bool | str = False,
    spec: VAESpec | None = None,
) -> RunFile:
    one = identity(vae=(spec or SPECS["cvvae-sd21"]).to_dict(), storage_dtype=dtype, logvar=logvar)
    return RunFile(fingerprint=one.fingerprint, identity=one, format=format_name, source={}, config={})  # type: ignore[arg-type]


def write_shard(folder: Path, run: RunFile, shard_id: str, latents: list[Latent]) -> ShardReceipt:
    """A shard with its index and receipt."""
    shard_format = FORMATS[run.format]
    payload, index = folder / shard_name(shard_id, shard_format.suffix), folder / index_name(shard_id)
    for path in (payload, index, folder / "receipts" / "none"):
        path.parent.mkdir(parents=True, exist_ok=True)
    header = ShardHeader(shard_id=shard_id, fingerprint=run.fingerprint, numerics={}, vae=run.identity.vae)
    places = shard_format.write(payload, iter(latents), header)
    stored = describe_file(shard_name(shard_id, shard_format.suffix), payload)
    rows = [latent.row for latent in latents]
    write_index(index, rows, places, header=header, shard_sha256=stored.sha256, shard_size=stored.size)
    statistics = ChannelStatistics()
    for latent in latents:
        statistics = statistics.merge(ChannelStatistics.of(latent.mean_CTHW))
    made = receipt(
        shard_id,
        fingerprint=run.fingerprint,
        payload=stored,
        index=describe_file(index_name(shard_id), index),
        counts=Counts(
            samples=len(rows), clips_encoded=len(rows), windows_decoded=len(rows), windows_stored=len(rows)
        ),
        buckets=rows_per_bucket(rows),
        decoders={},
        statistics=statistics,
        rejections=(),
    )
    (folder / "receipts" / f"{shard_id}.json").write_bytes(made.to_bytes())
    return made


def write_dataset(
    folder: Path, *, shards: int = 4, small: int = 13, long: int = 6, finished: bool = True, **run_fields: object
) -> dict[str, Latent]:
    """Shards with `small` + n and `long` windows; every latent by its key."""
    run = run_of(**run_fields)  # type: ignore[arg-type]
    found: dict[str, Latent] = {}
    receipts = []
    for number in range(shards):
        shard_id = f"{number:05d}"
        sizes = [SMALL] * (small + number) + [LONG] * long
        latents = latents_of(shard_id, sizes, dtype=run.identity.storage_dtype, logvar=run.identity.logvar)
        receipts.append(write_shard(folder, run, shard_id, latents))
        found |= {latent.row.key: latent for latent in latents}
    (folder / "run.json").write_bytes(run.to_bytes())
    if finished:
        manifest = build_manifest(run, receipts, ())
        DatasetFolder(Store(str(folder))).finish(manifest, "")
    return found


def rewrite_manifest(folder: Path, **changes: object) -> None:
    path = folder / "manifest.json"
    manifest = Manifest.from_bytes(path.read_bytes(), "manifest")
    path.write_bytes(manifest.model_copy(update=changes).to_bytes())
