"""A run of the encode job: what is left to do, doing it, and the manifest at the end.

Everything a user gave is checked in `plan_run`, before a cluster is used.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from cvvae import VAESpec, VideoVAE
from pipeline.card import dataset_card
from pipeline.checkpoints import VAESource, load_source
from pipeline.dataset import DatasetFolder, require_unchanged
from pipeline.documents import Manifest, RunFile, RunIdentity, ShardReceipt
from pipeline.errors import ConfigError, IdentityMismatch, PipelineError, PoisonShard, ShardError
from pipeline.manifest import build_manifest
from pipeline.policies import (
    DecodePolicy,
    EncodePolicy,
    FormatName,
    Policy,
    PublicUrl,
    ResizePolicy,
    StoreOptions,
    WindowPolicy,
)
from pipeline.records import VideoShard
from pipeline.run_log import RunLog
from pipeline.shard import ShardFailed, ShardJob, ShardOutcome, ShardPoisoned, ShardStored
from pipeline.sources import SourceSpec, count_samples, plan_source
from pipeline.storage import Store

COMMITS_AT_ONCE = 32
HURRY_SECONDS = 1.0
"""Outcomes that come faster than this do not wait for the commit before them."""


class OutputSpec(Policy):
    """Where the dataset goes."""

    url: PublicUrl
    """A local folder or any fsspec URL."""
    format: FormatName = "webdataset"
    """webdataset: tars. parquet: one file per shard, with FastVideo's columns and more."""
    single_driver: bool = False
    """Promise that one driver at a time writes here; needed for stores without conditional writes."""
    options: StoreOptions
    """fsspec options of the store, such as {endpoint_url: "https://..."}; no credentials."""


class EncodeSettings(Policy):
    """All that decides what a run writes. The cluster it runs on is not part of it."""

    source: SourceSpec
    output: OutputSpec
    vae: VAESource
    windows: WindowPolicy = WindowPolicy()
    resize: ResizePolicy = ResizePolicy()
    decode: DecodePolicy = DecodePolicy()
    encode: EncodePolicy = EncodePolicy()


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """A checked run: what is there, what is left."""

    settings: EncodeSettings
    dataset: DatasetFolder
    run_file: RunFile
    shards: tuple[VideoShard, ...]
    todo: tuple[VideoShard, ...]
    samples_todo: int | None
    """Samples in `todo`, where a table or the sidecars say so."""

    def job(self) -> ShardJob:
        settings = self.settings
        return ShardJob(
            source=settings.source,
            windows=settings.windows,
            resize=settings.resize,
            decode=settings.decode,
            identity=self.run_file.identity,
            format=settings.output.format,
            store=self.dataset.store,
        )


def plan_run(settings: EncodeSettings, config: dict[str, Any]) -> RunPlan:
    """Check everything, claim the output directory, and find the shards that have no receipt.

    `config` is the resolved config, kept in run.json for people. Raises ConfigError, SourceError, StorageError,
    IdentityMismatch, SourceChanged; ValueErrors of cvvae for a bad checkpoint.
    """
    vae = load_source(settings.vae)
    check_geometry(vae.spec, settings)
    source = plan_source(settings.source)
    identity = identity_of(settings, vae)
    output = settings.output
    dataset = DatasetFolder(Store(output.url, options=output.options, single_driver=output.single_driver))
    run_file = dataset.claim(
        RunFile(
            fingerprint=identity.fingerprint,
            identity=identity,
            format=output.format,
            source={**settings.source.model_dump(mode="json"), "table_sha256": source.table_sha256},
            config=config,
        )
    )
    todo = _without_committed(dataset, source.shards, run_file)
    return RunPlan(
        settings=settings,
        dataset=dataset,
        run_file=run_file,
        shards=source.shards,
        todo=todo,
        samples_todo=count_samples(todo, settings.source),
    )


def identity_of(settings: EncodeSettings, vae: VideoVAE) -> RunIdentity:
    """What a run with these settings and this VAE means by its numbers."""
    assert vae.weights_sha256 is not None, "loaded and seeded weights are named"
    return RunIdentity(
        weights_sha256=vae.weights_sha256,
        vae=vae.spec.to_dict(),
        windows=settings.windows,
        resize=settings.resize,
        decode_backends=settings.decode.backends,
        compute_dtype=settings.encode.dtype,
        storage_dtype=settings.encode.storage_dtype,
        logvar=settings.encode.logvar,
    )


def check_geometry(spec: VAESpec, settings: EncodeSettings) -> None:
    """ConfigError unless the VAE can encode every window and bucket that the settings ask for."""
    frames = settings.windows.frames
    try:
        spec.latent_shape(frames, spec.space_stride, spec.space_stride)
    except ValueError as error:
        raise ConfigError(f"windows.frames: {error}") from error
    for height, width in settings.resize.buckets:
        try:
            spec.latent_shape(frames, height, width)
        except ValueError as error:
            raise ConfigError(f"resize.buckets: [{height}, {width}]: {error}") from error


def _without_committed(
    dataset: DatasetFolder, shards: tuple[VideoShard, ...], run_file: RunFile
) -> tuple[VideoShard, ...]:
    """The shards that have no receipt. Receipts are checked one by one and not kept."""
    todo = {shard.id: shard for shard in shards}
    for receipt in dataset.receipt_heads(dataset.committed()):
        if receipt.fingerprint != run_file.fingerprint:
            raise IdentityMismatch(
                f"receipt of shard {receipt.shard_id} has fingerprint {receipt.fingerprint}, "
                f"run.json has {run_file.fingerprint}"
            )
        shard = todo.pop(receipt.shard_id, None)
        if shard is not None:
            require_unchanged(shard, receipt)
    return tuple(todo.values())


def commit_all(
    plan: RunPlan, outcomes: Iterable[ShardOutcome], log: RunLog, *, set_aside_poison: bool
) -> Iterator[ShardReceipt]:
    """Write the receipt of each stored shard as it comes back; yield the receipts that stand.

    A commit is three requests to the store, a tenth of a second on S3: one after the other they would hold up a
    cluster that ends more than ten shards a second. Receipts depend on nothing but their shard, so some are
    written at once. What was begun is ended, whatever comes in between.

    Raises ShardError for a shard that failed, PoisonShard for one that ended its actor too often, unless such shards
    are to be set aside.
    """
    under_way: deque[Future[ShardReceipt]] = deque()
    with ThreadPoolExecutor(COMMITS_AT_ONCE, thread_name_prefix="commit") as pool:
        asked = time.monotonic()
        for outcome in outcomes:
            in_a_hurry = time.monotonic() - asked < HURRY_SECONDS
            match outcome:
                case ShardStored():
                    under_way.append(pool.submit(_commit, plan.dataset, outcome, log))
                case ShardPoisoned(shard_id=shard_id) if set_aside_poison:
                    log.set_aside.append(shard_id)
                case _:
                    raise _failure(outcome)
            yield from _ended(under_way, leave=COMMITS_AT_ONCE if in_a_hurry else 0)
            asked = time.monotonic()
        yield from _ended(under_way, leave=0)
    plan.dataset.packs.flush()


def _commit(dataset: DatasetFolder, stored: ShardStored, log: RunLog) -> ShardReceipt:
    standing = dataset.commit(stored.receipt)
    log.note(standing.shard_id, stored.seconds)
    return standing


def _ended(under_way: deque[Future[ShardReceipt]], *, leave: int) -> Iterator[ShardReceipt]:
    """The results of commits that have ended, oldest first; waits while more than `leave` have not."""
    while under_way and (len(under_way) > leave or under_way[0].done()):
        yield under_way.popleft().result()


def _failure(outcome: ShardFailed | ShardPoisoned) -> ShardError:
    if isinstance(outcome, ShardFailed):
        return ShardError(outcome.shard_id, outcome.error)
    return PoisonShard(
        outcome.shard_id,
        f"ended its encode actor {outcome.poison_attempts} times. Look at its clips, raise the actor's memory, or "
        "set cluster.on_poison_shard: set_aside to go on without it.",
    )


def finish_run(plan: RunPlan, log: RunLog) -> Manifest:
    """Write card and manifest from the receipts that stand now, whoever wrote them.

    PipelineError if a shard has none and was not set aside.
    """
    committed = plan.dataset.committed()
    set_aside = sorted(set(log.set_aside) - set(committed))
    missing = {shard.id for shard in plan.shards} - set(committed) - set(set_aside)
    if missing:
        raise PipelineError(
            f"{len(missing)} of {len(plan.shards)} shards came to no end, the first is {min(missing)}: "
            "the manifest is not written. Start the run again."
        )
    receipts = plan.dataset.receipts(committed, plan.dataset.packs.load(committed))
    manifest = build_manifest(plan.run_file, receipts, set_aside)
    plan.dataset.finish(manifest, dataset_card(manifest))
    return manifest
