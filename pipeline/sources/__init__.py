"""Sources: what turns a config's `source` section into shards, and a shard into clips.

A source is a planner (`plan`) and a generator (`read`), joined in `SOURCES` under the kind that shards carry.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources.digest import SourceDigest
from pipeline.sources.spec import SourceSpec, TableSource, WebDatasetSource
from pipeline.sources.table import count_table_samples, plan_table, read_table_shard
from pipeline.sources.tar import count_tar_samples, plan_tars, read_tar_shard

__all__ = [
    "SOURCES",
    "SourceDigest",
    "SourcePlan",
    "SourceReader",
    "SourceSpec",
    "TableSource",
    "WebDatasetSource",
    "count_samples",
    "plan_source",
    "read_shard",
]


@dataclass(frozen=True, slots=True)
class SourcePlan:
    """Every shard of a source in a fixed order, and the hash of its table if it has one."""

    shards: tuple[VideoShard, ...]
    table_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class SourceReader:
    """How one kind of source is planned and read."""

    plan: Callable[..., SourcePlan]
    read: Callable[..., Iterator[Clip | Rejection]]
    count: Callable[..., int | None]


def _plan_webdataset(spec: WebDatasetSource) -> SourcePlan:
    return SourcePlan(plan_tars(spec))


def _plan_table(spec: TableSource) -> SourcePlan:
    shards, sha256 = plan_table(spec)
    return SourcePlan(shards, sha256)


SOURCES: dict[str, SourceReader] = {
    "webdataset": SourceReader(_plan_webdataset, read_tar_shard, count_tar_samples),
    "table": SourceReader(_plan_table, read_table_shard, count_table_samples),
}


def plan_source(spec: SourceSpec) -> SourcePlan:
    """All shards of a source, in the order of their ids. SourceError if there is none, or two share an id."""
    return SOURCES[spec.kind].plan(spec)


def count_samples(shards: Sequence[VideoShard], spec: SourceSpec) -> int | None:
    """How many samples the shards hold, where that can be known without reading them."""
    return SOURCES[spec.kind].count(shards, spec)


def read_shard(
    shard: VideoShard, spec: SourceSpec, *, max_clip_bytes: int, digest: SourceDigest
) -> Iterator[Clip | Rejection]:
    """Every sample of a shard, in source order, as a Clip or a Rejection. Fills `digest` when it ends."""
    return SOURCES[shard.kind].read(shard, spec, max_clip_bytes=max_clip_bytes, digest=digest)
