"""The loop a pipeline is measured against: decode children, batches, VAE, and nothing else.

No Ray, no spool, no file, no commit. The decode children never wait at a shard's end, since the clips of all shards
are one stream; batches are cut at the ends of shards as the pipeline cuts them, so that both do the same work.
"""

from __future__ import annotations

import itertools
import multiprocessing
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from jobs.steady_rate import ShardSpan
from pipeline.checkpoints import load_source
from pipeline.decode.pool import DecodeEvent, DecodePool, WindowReady
from pipeline.encoder import StageClock, TileBatcher, TileEncoder
from pipeline.prefetch import prefetched
from pipeline.records import Clip
from pipeline.run import EncodeSettings
from pipeline.sources import SourceDigest, plan_source, read_shard
from pipeline.windows import valid_lengths


def bare_loop(
    settings: EncodeSettings, *, decode_children: int, threads: int | None, seconds: float
) -> tuple[float, list[ShardSpan]]:
    """Encode the source over and over in a new process, for `seconds` after its first shard.

    Returns the Unix time at which the clock of the spans starts, and the spans.
    """
    # a new process, as an actor is one: nothing loaded, nothing allocated
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_loop, settings, decode_children, threads, seconds).result()


def _loop(
    settings: EncodeSettings, decode_children: int, threads: int | None, seconds: float
) -> tuple[float, list[ShardSpan]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = TileEncoder(load_source(settings.vae), settings.encode, device, threads=threads)
    with DecodePool(settings.decode, decode_children) as pool, prefetched(_clips(settings), depth=2) as clips:
        wanted = (clip for clip in clips if isinstance(clip, Clip))
        lengths = valid_lengths(settings.windows, encoder.spec.is_valid_num_frames)
        events = pool.decode(wanted, settings.windows, settings.resize, lengths)
        try:
            return time.time() - time.perf_counter(), list(_spans(events, encoder, seconds))
        finally:
            events.close()


def _clips(settings: EncodeSettings) -> Iterator[Any]:
    """Clips of one shard after the other, without end."""
    for shard in itertools.cycle(plan_source(settings.source).shards):
        limit = settings.decode.max_clip_bytes
        yield from read_shard(shard, settings.source, max_clip_bytes=limit, digest=SourceDigest())


def _spans(events: Iterator[DecodeEvent], encoder: TileEncoder, seconds: float) -> Iterator[ShardSpan]:
    """A span per shard; they follow each other without a gap. The source must have at least two shards."""
    started, deadline = time.perf_counter(), float("inf")
    for _, of_shard in itertools.groupby(events, key=lambda event: event.clip.shard_id):
        clock = StageClock()
        frames = _encode_shard(of_shard, encoder.batcher(clock))
        ended = time.perf_counter()
        yield ShardSpan(started, ended, frames, clock.seconds["encode"])
        deadline = min(deadline, ended + seconds)
        if ended >= deadline:
            return
        started = ended


def _encode_shard(events: Iterator[DecodeEvent], batcher: TileBatcher[int]) -> int:
    """Frames of the windows encoded."""
    frames = 0
    for event in events:
        if isinstance(event, WindowReady):
            window = event.window.frames_THWC
            frames += sum(length for length, _ in batcher.add(window, len(window)))
    return frames + sum(length for length, _ in batcher.flush())
