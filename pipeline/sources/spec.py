"""What a config's `source` section says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.policies import Policy, PublicUrl, StoreOptions

VIDEO_EXTENSIONS = ("mp4", "webm", "mkv", "mov", "avi", "m4v", "mpg", "mpeg", "flv", "wmv", "ogv", "ts", "3gp")


class WebDatasetSource(Policy):
    """Tars as video2dataset and WebDataset write them: files of a sample adjacent, named KEY.EXTENSION."""

    kind: Literal["webdataset"] = "webdataset"
    """Which kind of source this is."""
    urls: Annotated[tuple[PublicUrl, ...], Field(min_length=1)] | PublicUrl
    """A folder, a glob, a brace pattern ("s3://bucket/{00000..00999}.tar"), a file, or a list of these."""
    video_extensions: tuple[str, ...] = VIDEO_EXTENSIONS
    """Members with one of these extensions are videos; a sample without one is rejected no_video."""
    caption_keys: tuple[str, ...] = ("caption", "name")
    """Fields of the sample's json that hold the caption when it has no txt; the first present one counts."""
    options: StoreOptions
    """fsspec options of the store, such as {endpoint_url: "https://..."}; no credentials."""


class TableSource(Policy):
    """A CSV or Parquet table with a row per clip whose file is already in storage."""

    kind: Literal["table"] = "table"
    """Which kind of source this is."""
    url: PublicUrl
    """The table: a .parquet file, else a CSV with a header line."""
    uri: str = "{uri}"
    """Where a row's file is: a template over the columns, such as "{page_dir}/{videoid}.mp4". Relative results
    are taken from `root`."""
    root: PublicUrl | None = None
    """None: the table's own folder."""
    key: str | None = None
    """Template for the clip's key; None numbers the rows."""
    caption_column: str | None = "caption"
    """Column of the captions; None: the clips have none."""
    rows_per_shard: Annotated[int, Field(ge=1)] = 1000
    """The table is cut into shards of so many rows, in file order."""
    options: StoreOptions
    """fsspec options of the store, such as {endpoint_url: "https://..."}; no credentials."""


SourceSpec = Annotated[WebDatasetSource | TableSource, Field(discriminator="kind")]
