"""Windows of a dataset cut from their source again: decoded, cut and resized as the run did it, and checked.

A window counts as the one that was encoded if its clip has the hash that ties key, bytes and caption, and its frame
numbers and size are those of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing

from cvvae import spec_from_dict
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodePool, WindowReady
from pipeline.documents import RunFile
from pipeline.records import Clip, LatentRow, Rejection, VideoShard, Window
from pipeline.sources import SourceDigest, SourceSpec, read_shard
from pipeline.windows import valid_lengths


def cut_again(
    run: RunFile, shard: VideoShard, source: SourceSpec, rows: Sequence[LatentRow], pool: DecodePool
) -> Iterator[tuple[LatentRow, Window | str]]:
    """Each of the rows once, by clip in the source's order: its window, or why there is none.

    The source is read up to the last clip that is wanted; what its reader raises passes.
    """
    by_clip: dict[str, list[LatentRow]] = {}
    for row in rows:
        by_clip.setdefault(row.clip_key, []).append(row)
    limit = pool.policy.max_clip_bytes
    samples = read_shard(shard, source, max_clip_bytes=limit, digest=SourceDigest())
    with closing(samples):  # type: ignore[type-var] - a generator
        for sample in samples:
            if isinstance(sample, Rejection):
                continue
            if sample.key not in by_clip:
                sample.video.close()
                continue
            yield from _of_clip(run, sample, by_clip.pop(sample.key), pool)
            if not by_clip:
                return
    for row in (row for of_clip in by_clip.values() for row in of_clip):
        yield row, f"{shard.url} does not hold its clip {row.clip_key} any more"


def _of_clip(
    run: RunFile, clip: Clip, rows: Sequence[LatentRow], pool: DecodePool
) -> Iterator[tuple[LatentRow, Window | str]]:
    """The rows of one clip; closes it."""
    if any(row.pair_sha256 != clip.pair_sha256 for row in rows):
        clip.video.close()
        for row in rows:
            yield row, "the source has another video or caption than the latent was made from"
        return
    windows, rejection = _decoded(run, clip, max(row.window_index for row in rows), pool)
    for row in rows:
        window = windows.get(row.key)
        if rejection is not None:
            yield row, f"its clip was encoded, cannot be decoded now: {rejection.message}"
        elif window is None or window.frame_indices != row.frame_indices or window.shape != shape_of(row):
            decoders = ", ".join(pool.decoders)
            yield row, f"decoding its clip gives other frames (then by {row.source.decoder}, now by {decoders})"
        else:
            yield row, window


def _decoded(
    run: RunFile, clip: Clip, last_index: int, pool: DecodePool
) -> tuple[dict[str, Window], Rejection | None]:
    """Windows by key up to the last one that is wanted; closes the clip."""
    identity = run.identity
    policy = identity.windows.model_copy(update={"max_windows": last_index + 1})
    lengths = valid_lengths(policy, spec_from_dict(identity.vae).is_valid_num_frames)
    windows: dict[str, Window] = {}
    refused: Rejection | None = None
    with closing(pool.decode(iter((clip,)), policy, identity.resize, lengths)) as events:
        for event in events:
            match event:
                case WindowReady(window):
                    windows[window.key] = window
                case ClipRetracted():
                    windows.clear()
                case ClipDone(rejection=rejection):
                    refused = rejection
    return windows, refused


def shape_of(row: LatentRow) -> tuple[int, int, int]:
    """(T, H, W) of the row's frames."""
    return row.num_frames, row.height, row.width
