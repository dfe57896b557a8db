"""A sample of a source's real clips through the real shard code, on the hardware at hand.

The sample is cut into groups of a few clips, taken from shards that are spread over the sizes of all. A group goes
through `ShardEncoder` as a shard of its own, so its receipt says what became of every sample. What a group is too
small to show, the time of full batches, is measured apart, per tile shape. Estimates take groups, not clips, as what
varies: clips of one shard are alike.
"""

from __future__ import annotations

import itertools
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import psutil
import torch

from cvvae import VideoVAE
from pipeline.decode.pool import DecodePool
from pipeline.encoder import StageClock, TileEncoder
from pipeline.errors import SourceError
from pipeline.formats import FORMATS, TORCH_DTYPES, read_index
from pipeline.planning.census import spread
from pipeline.policies import DTypeName
from pipeline.records import Clip, Latent, LatentRow, Rejection, VideoShard
from pipeline.run import EncodeSettings, identity_of
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob, ShardStored
from pipeline.sources import SourceDigest, SourceSpec, read_shard
from pipeline.storage import Store

TileShape = tuple[int, int, int]
CLIPS_PER_GROUP = 4
BATCH_REPEATS = 3
STORAGE: tuple[DTypeName, ...] = ("float16", "bfloat16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTime:
    """Seconds of full batches of one tile shape, warm."""

    batch_size: int
    window_frames: int
    """Of the windows whose tiles were batched."""
    seconds: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupMeasure:
    """What became of one group of samples, and what it took."""

    totals: dict[str, float]
    """Sums over the group, by name: samples, clips, windows, frames, and so on."""
    tiles: dict[TileShape, int]
    encode_seconds: float
    """In batches that were mostly not full."""
    warm: bool
    """Every tile shape of the group had been encoded before."""


@dataclass(slots=True, kw_only=True)
class SampleMeasure:
    """All groups, and the batches' times."""

    fingerprint: str
    device: str
    groups: list[GroupMeasure] = field(default_factory=list)
    batches: dict[TileShape, BatchTime] = field(default_factory=dict)
    seconds: float = 0.0


def take_sample(
    settings: EncodeSettings,
    shards: Sequence[VideoShard],
    vae: VideoVAE,
    device: torch.device,
    *,
    threads: int | None,
    clips: int,
    max_seconds: float,
    on_group: Callable[[int, int], None] = lambda done, total: None,
) -> SampleMeasure:
    """Encode about `clips` samples; stops early after `max_seconds`, but never before three groups (or all there
    are). SourceError if the sampled shards hold nothing at all."""
    started = time.monotonic()
    num_groups = max(1, -(-clips // CLIPS_PER_GROUP))
    encoder = TileEncoder(vae, settings.encode, device, threads=threads)
    measure = SampleMeasure(fingerprint=identity_of(settings, vae).fingerprint, device=encoder.numerics()["device"])
    with ExitStack() as stack:
        pool = stack.enter_context(DecodePool(settings.decode, 1))
        scratch = stack.enter_context(closing(Scratch()))
        bench = _Bench(settings, vae, encoder, pool, scratch)
        for number, (shard, samples) in enumerate(_groups(settings, shards, num_groups, stack)):
            group = bench.measure(shard, samples, measure.batches)
            measure.groups.append(group)
            on_group(number + 1, num_groups)
            if len(measure.groups) >= 3 and time.monotonic() - started > max_seconds:
                break
    measure.seconds = time.monotonic() - started
    if not measure.groups:
        raise SourceError("the sampled shards hold no samples")
    return measure


def _groups(
    settings: EncodeSettings, shards: Sequence[VideoShard], num_groups: int, stack: ExitStack
) -> Iterator[tuple[VideoShard, list[Clip | Rejection]]]:
    """Groups in turns from shards spread over the sizes of all, from each one's start on."""
    by_size = sorted(shards, key=lambda shard: (shard.size or 0, shard.id))
    limit = settings.decode.max_clip_bytes
    open_shards = []
    for position in spread(len(by_size), num_groups):
        shard = by_size[position]
        samples = read_shard(shard, settings.source, max_clip_bytes=limit, digest=SourceDigest())
        open_shards.append((shard, stack.enter_context(closing(samples))))  # type: ignore[type-var]
    given = 0
    while open_shards and given < num_groups:
        for entry in list(open_shards)[: num_groups - given]:
            shard, samples = entry
            group = list(itertools.islice(samples, CLIPS_PER_GROUP))
            if len(group) < CLIPS_PER_GROUP:
                open_shards.remove(entry)
            if group:
                given += 1
                yield shard, group


@dataclass(frozen=True, slots=True)
class _Bench:
    settings: EncodeSettings
    vae: VideoVAE
    encoder: TileEncoder
    pool: DecodePool
    scratch: Scratch

    def measure(
        self, shard: VideoShard, samples: list[Clip | Rejection], batches: dict[TileShape, BatchTime]
    ) -> GroupMeasure:
        """Encode one group; adds the batch times of tile shapes that are new."""
        with self.scratch.folder("plan") as folder:
            job = self._job(folder)
            before = _cpu_seconds(self.pool)
            stored = ShardEncoder(job, self.encoder, self.pool, self.scratch, read=_given(samples)).run(
                replace(shard, size=None, etag=None)
            )
            decode_seconds = max(0.0, _cpu_seconds(self.pool) - before)
            rows = [indexed.row for indexed in read_index(folder / stored.receipt.index.path).rows]
            sizes = self._sizes(job, stored, folder)
            totals = _totals(stored, rows) | sizes | {"decode seconds": decode_seconds}
        tiles: Counter[TileShape] = Counter()
        new = False
        for row in rows:
            for tile in self.encoder.tiles(row.num_frames):
                shape = (tile.stop - tile.start, row.height, row.width)
                tiles[shape] += 1
                if shape not in batches:
                    new = True
                    batches[shape] = self._time_batch(shape, row.num_frames)
        return GroupMeasure(
            totals=totals, tiles=dict(tiles), encode_seconds=stored.seconds.get("encode", 0.0), warm=not new
        )

    def _job(self, folder: Path) -> ShardJob:
        settings = self.settings
        return ShardJob(
            source=settings.source,
            windows=settings.windows,
            resize=settings.resize,
            decode=settings.decode,
            identity=identity_of(settings, self.vae),
            format=settings.output.format,
            store=Store(str(folder)),
        )

    def _time_batch(self, shape: TileShape, window_frames: int) -> BatchTime:
        """Of noise: how long a convolution takes does not depend on the picture."""
        size = self.encoder.batch_size(shape)
        frames = np.random.default_rng(0).integers(0, 256, (size, *shape, 3), dtype=np.uint8)
        seconds = []
        for _ in range(1 + BATCH_REPEATS):
            clock = StageClock()
            self.encoder.encode(frames, clock, num_frames=window_frames)
            seconds.append(clock.seconds["encode"])
        return BatchTime(batch_size=size, window_frames=window_frames, seconds=tuple(seconds[1:]))

    def _sizes(self, job: ShardJob, stored: ShardStored, folder: Path) -> dict[str, float]:
        """Payload bytes of the group's latents in every storage dtype, with and without the log variance, as the
        format writes them. Without padding: a group is padded to 10 KiB of a tar as a whole shard is."""
        shard_format, receipt = FORMATS[job.format], stored.receipt
        with (folder / receipt.payload.path).open("rb") as file:
            header = shard_format.read_header(file)
            latents = list(shard_format.read(file))
        shard_format.write(folder / "empty", iter(()), header)
        empty = _unpadded(folder / "empty")  # a whole shard has one header and one end, a sample one per group
        own = {
            "payload bytes": float(_unpadded(folder / receipt.payload.path) - empty),
            "empty bytes": float(empty),
            "padding bytes": float(shard_format.padded_to - 1),
        }
        sizes = {}
        for dtype, logvar in itertools.product(STORAGE, (False, True)):
            path = folder / "size"
            shard_format.write(path, (_stored_as(latent, dtype, logvar) for latent in latents), header)
            sizes[size_name(dtype, logvar)] = float(_unpadded(path) - empty)
        return sizes | own


def size_name(dtype: DTypeName, logvar: bool) -> str:
    """What a choice of storage is called in a plan."""
    return f"{dtype} mean and log variance" if logvar else f"{dtype} mean"


def _stored_as(latent: Latent, dtype: DTypeName, logvar: bool) -> Latent:
    mean = latent.mean_CTHW.to(TORCH_DTYPES[dtype])
    row = replace(latent.row, latent_dtype=dtype, has_logvar=logvar)
    return Latent(row=row, mean_CTHW=mean, logvar_CTHW=mean if logvar else None)


def _unpadded(path: Path) -> int:
    """Bytes of a file up to the zeros at its end, in whole blocks: a tar's last member is filled up, too."""
    return -(-len(path.read_bytes().rstrip(b"\0")) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE


def _given(samples: list[Clip | Rejection]) -> Callable[..., Iterator[Clip | Rejection]]:
    def read(
        shard: VideoShard, spec: SourceSpec, /, *, max_clip_bytes: int, digest: SourceDigest
    ) -> Iterator[Clip | Rejection]:
        return iter(samples)

    return read


def _cpu_seconds(pool: DecodePool) -> float:
    """Of the decode children that run now."""
    total = 0.0
    for pid in pool.child_pids():
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def _totals(stored: ShardStored, rows: list[LatentRow]) -> dict[str, float]:
    receipt = stored.receipt
    clips = {row.clip_key: row for row in rows}
    counts = receipt.counts
    totals = {
        "samples": counts.samples,
        "clips": counts.clips_encoded,
        "windows": counts.windows_stored,
        "frames": counts.frames_stored,
        "frames decoded": counts.frames_decoded,
        "video seconds": sum(row.source.duration or row.frame_times[-1] for row in clips.values()),
    }
    totals |= {f"bucket {name}": number for name, number in receipt.buckets.items()}
    totals |= {f"rejected {name}": number for name, number in receipt.rejected_by_class().items()}
    return {name: float(value) for name, value in totals.items()}
