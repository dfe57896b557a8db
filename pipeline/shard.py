"""One shard from its first byte to its upload: what an encode actor does with a row.

    read      one sequential pass over the source, a few clips ahead         a thread
    decode    windows of the clips, in clip order                            child processes
    encode    tiles of many windows in batches of one shape                  the VAE
    write     latents spooled locally, put in order, one deterministic file
    store     created only if absent; the first whole object wins

Plain Python: no Ray in here, so that everything but the scheduling is tested without it.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from cvvae import DiagonalGaussian
from pipeline.activity import SHARD, EncoderActivity
from pipeline.dataset import describe_file, describe_stored, index_name, shard_name
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodeEvent, DecodePool, WindowReady
from pipeline.documents import Document, RejectionRecord, RunIdentity, ShardReceipt, SourceRecord, StoredObject
from pipeline.encoder import BatchTooLarge, StageClock, TileBatcher, TileEncoder
from pipeline.errors import ClipError, DatasetError, RejectionClass, ShardError
from pipeline.formats import FORMATS, ShardHeader, write_index
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.ledger import ClipAttempt, ClipLost, ShardLedger
from pipeline.logvar_code import logvar_to_int8
from pipeline.manifest import rows_per_bucket, rows_per_decoder
from pipeline.policies import DecodePolicy, FormatName, ResizePolicy, WindowPolicy
from pipeline.prefetch import prefetched
from pipeline.records import Clip, Latent, LatentRow, Rejection, VideoShard, Window
from pipeline.scratch import Scratch
from pipeline.sources import SourceDigest, SourceSpec, read_shard
from pipeline.spool import LatentSpool
from pipeline.stats import ChannelStatistics
from pipeline.storage import Store
from pipeline.store_errors import redact
from pipeline.tile_proof import TileProver
from pipeline.windows import valid_lengths

log = logging.getLogger(__name__)

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardJob:
    """What all shards of a run have in common."""

    source: SourceSpec
    windows: WindowPolicy
    resize: ResizePolicy
    decode: DecodePolicy
    identity: RunIdentity
    format: FormatName
    store: Store


class ShardStored(Document):
    """A stored shard, not yet committed: the driver writes the receipt."""

    shard_id: str
    receipt: ShardReceipt
    seconds: dict[str, float]
    """Per stage; stages of one shard overlap those of another."""


class ShardPoisoned(Document):
    """A shard that ended its encode actor too often to be tried again."""

    shard_id: str
    poison_attempts: int


class ShardFailed(Document):
    """A shard that failed for a reason that trying again would not mend. Data, since an exception would lose its
    type and its shard on the way through Ray."""

    shard_id: str
    error: str


ShardOutcome = ShardStored | ShardPoisoned | ShardFailed


class ReadShard(Protocol):
    """`pipeline.sources.read_shard`, or a part of what it gives."""

    def __call__(
        self, shard: VideoShard, spec: SourceSpec, /, *, max_clip_bytes: int, digest: SourceDigest
    ) -> Iterator[Clip | Rejection]: ...


class ShardEncoder:
    """Encodes shards with one VAE replica and one pool of decode children. `run` may be called by two threads."""

    def __init__(
        self,
        job: ShardJob,
        encoder: TileEncoder,
        pool: DecodePool,
        scratch: Scratch,
        *,
        read: ReadShard = read_shard,
    ) -> None:
        """`read` gives a shard's samples; a plan gives a part of them."""
        self.job = job
        self._read = read
        self._encoder = encoder
        self._pool = pool
        self._scratch = scratch
        self._format = FORMATS[job.format]
        self._storage_dtype = TORCH_DTYPES[job.identity.storage_dtype]

    def run(self, shard: VideoShard) -> ShardStored:
        """Encode and store one shard. ShardError if what is stored under its name cannot be ours, or if there is no
        local room for it."""
        with self._encoder.activity.during(SHARD):
            return self._run(shard, StageClock(self._encoder.activity))

    def _run(self, shard: VideoShard, clock: StageClock) -> ShardStored:
        lost: dict[str, Rejection] = {}
        while True:
            try:
                stored = self._run_without(lost, shard, clock)
                self._encoder.activity.count_receipt(stored.receipt)
                return stored
            except ClipLost as clip:
                self._encoder.activity.count("retries.clip_lost")
                # What it gave before it was lost has shifted the batches by a number of windows that chance decides.
                # Without it they are those of the other clips alone, in this run as in any other.
                log.warning("shard starts over without a clip: shard=%s clip=%s", shard.id, clip.rejection.key)
                lost[clip.rejection.key] = clip.rejection
            except BatchTooLarge as batch:
                # From its start, so that its batches are those of a run whose encode.batch_pixels is the smaller one.
                self._shrink(shard, batch)
            except OSError as error:  # of the store it would be a StorageError
                if error.errno not in _NO_ROOM:
                    raise
                where = self._scratch.path.parent
                raise ShardError(
                    shard.id, f"cannot write to its node's scratch folder {where} (in $TMPDIR): {error}"
                ) from error

    def _shrink(self, shard: VideoShard, batch: BatchTooLarge) -> None:
        """Go on with smaller batches. ShardError if the one that did not fit was a single tile."""
        if not self._encoder.shrink(batch):
            frames, height, width = batch.shape
            raise ShardError(
                shard.id,
                f"one tile of {frames} x {height} x {width} does not fit in the memory of {self._encoder.device}; "
                "take a smaller bucket, half precision, or a device with more memory",
            )
        self._encoder.activity.count("retries.out_of_memory")
        log.warning(
            "device out of memory, shard starts over with smaller batches: shard=%s batch_pixels=%d before=%d",
            *(shard.id, self._encoder.batch_pixels, batch.batch_pixels),
        )

    def _run_without(self, lost: dict[str, Rejection], shard: VideoShard, clock: StageClock) -> ShardStored:
        """One pass over the shard; `lost` clips are rejected unseen."""
        ledger = ShardLedger(shard.id)
        with self._scratch.folder(shard.id) as folder:
            with LatentSpool(folder / "spool") as spool:
                prover = TileProver(shard.id, self._encoder, clock)
                batcher: TileBatcher[_Ticket] = self._encoder.batcher(clock)
                digest = self._encode_clips(shard, batcher, spool, ledger, lost, clock, prover)
                with clock.measure("write"):
                    written = self._write(shard, self._header(shard, batcher), spool, ledger, folder)
            counts = ledger.counts()
            counts.check(f"shard {shard.id}")
            assert len(written.rows) == counts.windows_stored, "the ledger and the payload hold the same windows"
            with clock.measure("store"):
                stored = self._store(shard, written, folder)
        return ShardStored(
            shard_id=shard.id, receipt=self._receipt(shard, digest, ledger, stored, prover), seconds=clock.seconds
        )

    def _encode_clips(
        self,
        shard: VideoShard,
        batcher: TileBatcher[_Ticket],
        spool: LatentSpool,
        ledger: ShardLedger,
        lost: dict[str, Rejection],
        clock: StageClock,
        prover: TileProver,
    ) -> SourceDigest:
        digest = SourceDigest()
        samples = self._read(shard, self.job.source, max_clip_bytes=self.job.decode.max_clip_bytes, digest=digest)
        with prefetched(samples, depth=2) as ahead:
            clips = _clips_only(ahead, ledger, lost, self._encoder.activity)
            lengths = valid_lengths(self.job.windows, self._encoder.spec.is_valid_num_frames)
            with closing(self._pool.decode(clips, self.job.windows, self.job.resize, lengths)) as events:
                for event in clock.waits("wait for decode", events):
                    self._take(event, batcher, spool, ledger, prover)
            for done, posterior in batcher.flush():
                self._keep(done, posterior, spool, ledger, prover)
        return digest

    def _take(
        self,
        event: DecodeEvent,
        batcher: TileBatcher[_Ticket],
        spool: LatentSpool,
        ledger: ShardLedger,
        prover: TileProver,
    ) -> None:
        match event:
            case WindowReady(window, clip):
                proved = window.frames_THWC if prover.chooses(window.key) else None
                ticket = _Ticket(self._row(window, clip), ledger.attempt(clip.key), proved)
                for done, posterior in batcher.add(window.frames_THWC, ticket):
                    self._keep(done, posterior, spool, ledger, prover)
            case ClipRetracted(clip):
                ledger.retract(clip.key)
            case ClipDone():
                self._encoder.activity.count("clips_read")
                ledger.finish(event)

    def _keep(
        self,
        ticket: _Ticket,
        posterior: DiagonalGaussian,
        spool: LatentSpool,
        ledger: ShardLedger,
        prover: TileProver,
    ) -> None:
        """Spool a window's latent, or reject it if it is not finite in the storage dtype."""
        if not ticket.attempt.valid:
            return
        mean = posterior.mean[0].to(self._storage_dtype)
        stored = self.job.identity.logvar
        logvar = posterior.logvar[0].to(self._storage_dtype) if stored else None
        try:
            _require_finite(mean, "mean")
            if logvar is not None:
                _require_finite(logvar, "logvar")
                logvar = logvar_to_int8(posterior.logvar[0]) if stored == "int8" else logvar
        except ClipError as error:
            row = ticket.row
            ledger.reject_window(
                Rejection.from_error(error, key=row.key, shard_id=row.shard_id, scope="window"), ticket.attempt
            )
            return
        if ticket.proved_THWC is not None:
            prover.check(ticket.row, ticket.proved_THWC, posterior.mean[0])
        spool.append(Latent(row=ticket.row, mean_CTHW=mean, logvar_CTHW=logvar))
        ledger.store_window(ticket.row, ticket.attempt)

    def _row(self, window: Window, clip: Clip) -> LatentRow:
        identity = self.job.identity
        return LatentRow.of(
            window,
            clip,
            latent_shape=self._encoder.spec.latent_shape(*window.shape),
            latent_dtype=identity.storage_dtype,
            has_logvar=bool(identity.logvar),
        )

    def _header(self, shard: VideoShard, batcher: TileBatcher[_Ticket]) -> ShardHeader:
        return ShardHeader(
            shard_id=shard.id,
            fingerprint=self.job.identity.fingerprint,
            numerics=self._encoder.numerics(batcher.batch_pixels),
            vae=self.job.identity.vae,
        )

    def _write(
        self, shard: VideoShard, header: ShardHeader, spool: LatentSpool, ledger: ShardLedger, folder: Path
    ) -> _WrittenShard:
        stored = {id(row) for row in ledger.stored_rows()}
        latents = spool.ordered(lambda row: id(row) in stored)
        return self._write_files(shard, latents, header, folder)

    def _write_files(
        self, shard: VideoShard, latents: Iterator[Latent], header: ShardHeader, folder: Path
    ) -> _WrittenShard:
        """Payload and index files, and what the receipt says of them."""
        payload_path, index_path = folder / f"{shard.id}{self._format.suffix}", folder / "index.parquet"
        rows: list[LatentRow] = []
        statistics = ChannelStatistics()

        def observed() -> Iterator[Latent]:
            nonlocal statistics
            for latent in latents:
                rows.append(latent.row)
                statistics = statistics.merge(ChannelStatistics.of(latent.mean_CTHW))
                yield latent

        places = self._format.write(payload_path, observed(), header)
        payload = describe_file(shard_name(shard.id, self._format.suffix), payload_path)
        write_index(index_path, rows, places, header=header, shard_sha256=payload.sha256, shard_size=payload.size)
        return _WrittenShard(
            payload_path=payload_path,
            index_path=index_path,
            payload=payload,
            index=describe_file(index_name(shard.id), index_path),
            numerics=header.numerics,
            statistics=statistics,
            rows=rows,
        )

    def _store(self, shard: VideoShard, written: _WrittenShard, folder: Path) -> _WrittenShard:
        """Create both objects; where the payload was there already, the receipt describes that one."""
        store = self.job.store
        if not store.create(written.payload.path, written.payload_path):
            standing = describe_stored(store, written.payload.path)
            if standing != written.payload:
                written = self._adopt(shard, written, standing, folder)
        if not store.create(written.index.path, written.index_path):
            standing = describe_stored(store, written.index.path)
            if standing != written.index:
                raise ShardError(
                    shard.id,
                    f"{store.full_url(written.index.path)} is not the index of the payload beside it "
                    f"(expected sha256 {written.index.sha256}, got {standing.sha256}); "
                    "delete both to encode it again",
                )
        return written

    def _adopt(
        self, shard: VideoShard, written: _WrittenShard, standing: StoredObject, folder: Path
    ) -> _WrittenShard:
        """Describe a whole object that another attempt with other numerics stored first.

        It must hold the same windows of the same clips under the same identity, and writing its latents again must
        give its bytes. ShardError says which of these is not so.
        """
        adopted = folder / "adopted"
        adopted.mkdir()
        where = self.job.store.full_url(standing.path)
        try:
            with self.job.store.open_seekable(standing.path) as file:
                header = self._format.read_header(file)
                again = self._write_files(shard, self._format.read(file), header, adopted)
        except DatasetError as error:
            raise ShardError(
                shard.id, f"{where} is damaged ({error}); delete it to encode the shard again"
            ) from error
        if header.fingerprint != self.job.identity.fingerprint:
            difference = f"its identity is {header.fingerprint}, this run's {self.job.identity.fingerprint}"
        elif [_content(row) for row in again.rows] != [_content(row) for row in written.rows]:
            difference = f"it holds {len(again.rows)} windows, not the {len(written.rows)} of this source"
        elif again.payload != standing:
            difference = f"it was written by other library versions ({header.numerics.get('libraries')})"
        else:
            return again
        raise ShardError(
            shard.id,
            f"{where} was stored by another attempt and holds something else: {difference}; "
            "delete it to encode the shard again",
        )

    def _receipt(
        self, shard: VideoShard, digest: SourceDigest, ledger: ShardLedger, stored: _WrittenShard, prover: TileProver
    ) -> ShardReceipt:
        return ShardReceipt(
            shard_id=shard.id,
            fingerprint=self.job.identity.fingerprint,
            source=SourceRecord(
                url=redact(shard.url),
                kind=shard.kind,
                size=shard.size,
                etag=shard.etag,
                sha256=digest.sha256,
                rows=shard.rows,
                byte_span=shard.byte_span,
            ),
            payload=stored.payload,
            index=stored.index,
            numerics=stored.numerics,
            counts=ledger.counts(),
            buckets=rows_per_bucket(stored.rows),
            decoders=rows_per_decoder(stored.rows),
            statistics=stored.statistics,
            rejections=tuple(
                RejectionRecord(**{k: v for k, v in asdict(rejection).items() if k != "shard_id"})
                for rejection in ledger.rejections()
            ),
            tile_proof=prover.summary(ledger.stored_rows()),
        )


@dataclass(frozen=True, slots=True)
class _Ticket:
    """What a window is, while its tiles are being encoded."""

    row: LatentRow
    attempt: ClipAttempt
    proved_THWC: np.ndarray | None
    """Its frames, kept if its tiles are to be proved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _WrittenShard:
    payload_path: Path
    index_path: Path
    payload: StoredObject
    index: StoredObject
    numerics: dict[str, Any]
    statistics: ChannelStatistics
    rows: list[LatentRow]


def _content(row: LatentRow) -> LatentRow:
    """The row without what may differ between two attempts that mean the same numbers."""
    return replace(row, source=replace(row.source, decoder=""))


def _clips_only(
    samples: Iterator[Clip | Rejection], ledger: ShardLedger, lost: dict[str, Rejection], activity: EncoderActivity
) -> Iterator[Clip]:
    """Samples refused while reading, or lost before, go to the ledger; the others to the decoders."""
    for sample in samples:
        if isinstance(sample, Rejection):
            ledger.reject_sample(sample)
        elif sample.key in lost:
            sample.video.close()
            ledger.reject_sample(lost[sample.key])
        else:
            activity.count("clip_bytes", sample.video.size)
            yield sample


def _require_finite(latent_CTHW: torch.Tensor, name: str) -> None:
    bad = int((~torch.isfinite(latent_CTHW)).sum())
    if bad:
        raise ClipError(
            RejectionClass.NON_FINITE,
            "encode",
            f"{bad} of {latent_CTHW.numel()} values of the {name} are NaN or Inf as {latent_CTHW.dtype}",
        )
