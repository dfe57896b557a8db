"""A table with a row per clip: CSV or Parquet, whose files are already in storage.

The table is cut into `rows_per_shard` in file order. A CSV is scanned once, at planning, for the byte position of
every shard's first row, so that an actor reads only its own span; a Parquet file is read by row groups.
"""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import math
import re
import string
from collections import deque
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import ClipError, ConfigError, RejectionClass, SourceChanged, SourceError
from pipeline.records import Clip, Rejection, VideoShard
from pipeline.sources.clip_file import fetch_clip
from pipeline.sources.digest import SourceDigest
from pipeline.sources.keys import require_safe_key
from pipeline.sources.metadata import plain_json
from pipeline.sources.spec import TableSource
from pipeline.storage import object_info, open_seekable_url, open_stream
from pipeline.store_errors import redact

ROWS_TRIED = 100
"""Rows of a table that planning follows to a file before it calls the settings wrong."""
_CHUNK = 1 << 20
_LONGEST_LINE = 16 << 20


def plan_table(spec: TableSource) -> tuple[tuple[VideoShard, ...], str]:
    """The shards of a table and its sha256. SourceError if it is missing or empty, ConfigError for its columns."""
    try:
        info = object_info(spec.url, spec.options)
    except FileNotFoundError as error:
        raise SourceError(f"source.url: {spec.url} does not exist") from error
    except (ValueError, TypeError) as error:  # fsspec knows no such protocol, or its client no such option
        raise ConfigError(f"source.url, source.options: {spec.url!r}: {error}") from error
    is_parquet = spec.url.endswith(".parquet")
    with open_seekable_url(spec.url, spec.options) as file:
        columns, spans = _parquet_spans(file, spec) if is_parquet else _csv_spans(_buffered(file), spec)
    _check_columns(columns, spec)
    if not spans:
        raise SourceError(f"source.url: {spec.url} has no rows")
    stem = PurePosixPath(urlsplit(spec.url).path).stem
    shards = tuple(
        VideoShard(
            id=f"{stem}-{number:05d}",
            kind="table",
            url=spec.url,
            size=info.size,
            etag=info.etag,
            rows=rows,
            byte_span=byte_span,
        )
        for number, (rows, byte_span) in enumerate(spans)
    )
    _require_some_file(shards[0], spec)
    return shards, _sha256(spec)


def _require_some_file(shard: VideoShard, spec: TableSource) -> None:
    """ConfigError if none of the first rows leads to a file: source.root or source.uri is wrong, and a run would
    reject every clip. As a rule the first row's file is there and this is one request."""
    tried: list[str] = []
    for row in itertools.islice(_rows(shard, spec), ROWS_TRIED):
        try:
            if isinstance(row, ClipError):
                raise row
            tried.append(_resolve(_fill(spec.uri, row, RejectionClass.NO_VIDEO), spec))
            object_info(tried[-1], spec.options)
        except ClipError as error:
            tried.append(error.message)
        except (FileNotFoundError, ValueError):
            continue
        else:
            return
    raise ConfigError(
        f"source.root, source.uri: none of the first {len(tried)} rows of {spec.url} leads to a file; the first was "
        f"looked for at {redact(tried[0])}"
    )


def _sha256(spec: TableSource) -> str:
    digest = hashlib.sha256()
    with open_stream(spec.url, spec.options) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


_Span = tuple[tuple[int, int], tuple[int, int] | None]


def _parquet_spans(file: BinaryIO, spec: TableSource) -> tuple[list[str], list[_Span]]:
    try:
        parquet = pq.ParquetFile(file)
        columns = list(parquet.schema_arrow.names)
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: a column's name is not UTF-8
        raise SourceError(f"source.url: {spec.url} is not a Parquet file: {error}") from error
    total, step = parquet.metadata.num_rows, spec.rows_per_shard
    held = sum(parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups))
    if held != total:
        raise SourceError(f"source.url: {spec.url} is damaged: its footer says {total} rows, its row groups {held}")
    spans: list[_Span] = [((start, min(start + step, total)), None) for start in range(0, total, step)]
    return columns, spans


def _csv_spans(file: BinaryIO, spec: TableSource) -> tuple[list[str], list[_Span]]:
    """Byte spans of every `rows_per_shard` rows."""
    lines = _CsvLines(file)
    rows = csv.reader(lines)
    spans: list[_Span] = []
    row, first_row, last_lines, quotes = 0, 0, 1, 0
    try:
        columns = next(rows, [])
        start = lines.end_row()
        for values in rows:
            last_lines, quotes = lines.lines, lines.quotes
            end = lines.end_row()
            row += bool(values)  # a blank line is no row
            if row - first_row == spec.rows_per_shard:
                spans.append(((first_row, row), (start, end)))
                first_row, start = row, end
    except csv.Error as error:
        raise SourceError(f"source.url: {spec.url}: row {row}: {error}: is a quote missing?") from error
    if last_lines > 1 and quotes % 2:
        raise SourceError(f"source.url: {spec.url}: row {row - 1} runs to the end of the table: is a quote missing?")
    if row > first_row:
        spans.append(((first_row, row), (start, lines.position)))
    return columns, spans


def _buffered(file: BinaryIO) -> BinaryIO:
    """fsspec's remote files have no readline with a limit, and a slow one without."""
    return io.BufferedReader(cast(io.RawIOBase, file), _CHUNK)


class _CsvLines:
    """The lines of a CSV, one at a time as csv.reader asks for them, so that it is known where each row ends."""

    def __init__(self, file: BinaryIO, *, from_start: bool = True) -> None:
        self._file = file
        self._encoding = "utf-8-sig" if from_start else "utf-8"
        self._ahead: deque[bytes] = deque()
        self.position = 0
        """Bytes taken."""
        self.lines = 0
        """Lines of the row at hand."""
        self.quotes = 0
        """Quotes in it."""

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        if not self._ahead:
            line = self._file.readline(_LONGEST_LINE)
            if not line:
                raise StopIteration
            if len(line) == _LONGEST_LINE:
                raise SourceError(f"a line of the table is longer than {_LONGEST_LINE} bytes: is it a CSV?")
            # a carriage return alone ends a row, too (Python's csv module reads files that way)
            self._ahead.extend(part for part in re.split(rb"(?<=\r)(?!\n)", line) if part)
        part = self._ahead.popleft()
        text = part.decode(self._encoding, "surrogateescape")
        self._encoding = "utf-8"
        self.position += len(part)
        self.lines += 1
        self.quotes += part.count(b'"')
        return text

    def end_row(self) -> int:
        """Begin to count another row; where the one at hand ended."""
        self.lines = self.quotes = 0
        return self.position


def _check_columns(columns: list[str], spec: TableSource) -> None:
    """ConfigError unless templates and caption_column name columns of the table."""
    if len(set(columns)) != len(columns):
        raise ConfigError(f"source.url: {spec.url} has two columns of one name: {columns}")
    for setting, template in (("uri", spec.uri), ("key", spec.key)):
        if template is None:
            continue
        try:
            fields = list(string.Formatter().parse(template))
        except ValueError as error:
            raise ConfigError(f"source.{setting}: template {template!r}: {error}") from error
        for _, column, format_spec, conversion in fields:
            if column is not None and (column not in columns or format_spec or conversion):
                raise ConfigError(
                    f"source.{setting}: template {template!r} does not fit the table: expected plain fields such as "
                    f"{{{columns[0] if columns else 'column'}}}, got {column!r}; columns: {columns}"
                )
    if spec.caption_column is not None and spec.caption_column not in columns:
        raise ConfigError(f"source.caption_column: expected one of {columns}, got {spec.caption_column!r}")


def _fill(template: str, row: dict[str, Any], error_class: RejectionClass) -> str:
    """The template with a row's values. ClipError if one of them is missing: half a path is another path."""
    filled = ""
    for text, column, _, _ in string.Formatter().parse(template):
        filled += text
        if column is None:
            continue
        if row[column] in (None, ""):
            raise ClipError(error_class, "read", f"column {column!r} is empty; it is needed for {template!r}")
        filled += str(row[column])  # format_map would take a column named "a.b" or "0" for something else
    return filled


def count_table_samples(shards: Sequence[VideoShard], spec: TableSource) -> int:
    """Rows in the shards' spans."""
    return sum(shard.rows[1] - shard.rows[0] for shard in shards if shard.rows is not None)


def read_table_shard(
    shard: VideoShard, spec: TableSource, *, max_clip_bytes: int, digest: SourceDigest
) -> Iterator[Clip | Rejection]:
    """Every row of a shard's span, as the clip its file holds. The consumer closes each Clip's Blob."""
    assert shard.rows is not None, "a table shard has a row span"
    _require_planned_table(shard, spec)
    seen: set[str] = set()
    for number, row in enumerate(_rows(shard, spec), start=shard.rows[0]):
        key = f"{number:010d}"
        try:
            if isinstance(row, ClipError):
                raise row
            key = _fill(spec.key, row, RejectionClass.BAD_METADATA) if spec.key else key
            yield _to_clip(key, row, shard, spec, seen, max_clip_bytes)
        except ClipError as error:
            yield Rejection.from_error(error, key=key, shard_id=shard.id)


def _require_planned_table(shard: VideoShard, spec: TableSource) -> None:
    """SourceChanged if the table is another one than when its rows were cut into shards."""
    info = object_info(spec.url, spec.options)
    if (info.size, info.etag) != (shard.size, shard.etag):
        raise SourceChanged(
            f"{spec.url}: it had {shard.size} bytes (ETag {shard.etag}) when the run was planned, "
            f"now {info.size} (ETag {info.etag})"
        )


def _rows(shard: VideoShard, spec: TableSource) -> Iterator[dict[str, Any] | ClipError]:
    return _parquet_rows(shard, spec) if shard.byte_span is None else _csv_rows(shard, spec)


def _csv_rows(shard: VideoShard, spec: TableSource) -> Iterator[dict[str, Any] | ClipError]:
    assert shard.byte_span is not None
    start, stop = shard.byte_span
    with open_seekable_url(spec.url, spec.options) as remote, _buffered(remote) as file:
        columns = next(csv.reader(_CsvLines(file)))
        file.seek(start)
        span = _CsvLines(io.BytesIO(file.read(stop - start)), from_start=False)
    for values in csv.reader(span):
        if len(values) == len(columns):
            yield dict(zip(columns, values, strict=True))
        elif values:
            # its values may stand under the wrong columns: not a pairing to trust
            message = f"the row has {len(values)} values, the table has {len(columns)} columns"
            yield ClipError(RejectionClass.BAD_METADATA, "read", message)


def _parquet_rows(shard: VideoShard, spec: TableSource) -> Iterator[dict[str, Any] | ClipError]:
    assert shard.rows is not None
    start, stop = shard.rows
    with open_seekable_url(spec.url, spec.options) as file:
        parquet = pq.ParquetFile(file)
        group_start = 0
        for group in range(parquet.num_row_groups):
            group_rows = parquet.metadata.row_group(group).num_rows
            low, high = max(start, group_start), min(stop, group_start + group_rows)
            if low < high:
                table = _read_group(parquet, group, spec)
                yield from _python_rows(table.slice(low - group_start, high - low))
            group_start += group_rows


def _read_group(parquet: pq.ParquetFile, group: int, spec: TableSource) -> pa.Table:
    """SourceError for damaged pages, and for fewer rows than the footer says."""
    try:
        table = parquet.read_row_group(group)
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise SourceError(f"source.url: {spec.url}: row group {group} cannot be read: {error}") from error
    expected = parquet.metadata.row_group(group).num_rows
    if table.num_rows != expected:
        raise SourceError(
            f"source.url: {spec.url}: row group {group} has {table.num_rows} rows, its footer says {expected}"
        )
    return table


def _python_rows(table: pa.Table) -> Iterator[dict[str, Any] | ClipError]:
    """A row with a value that Python cannot hold (text that is not UTF-8, a date after 9999) is refused alone."""
    try:
        rows = table.to_pylist()
    except (ValueError, ArithmeticError, pa.ArrowException) as error:
        if table.num_rows > 1:
            rows = (row for number in range(table.num_rows) for row in _python_rows(table.slice(number, 1)))
        else:
            rows = [ClipError(RejectionClass.BAD_METADATA, "read", f"row: {error}")]
    yield from rows


def _to_clip(
    key: str, row: dict[str, Any], shard: VideoShard, spec: TableSource, seen: set[str], max_clip_bytes: int
) -> Clip:
    require_safe_key(key)
    if key in seen:
        raise ClipError(RejectionClass.DUPLICATE_KEY, "read", f"{key!r} was seen before in this shard")
    seen.add(key)
    caption = _caption(row, spec.caption_column)
    metadata = _json_types(row)
    uri = _fill(spec.uri, row, RejectionClass.NO_VIDEO)
    blob, sha256 = fetch_clip(_resolve(uri, spec), spec.options, max_bytes=max_clip_bytes)
    return Clip(
        key=key,
        shard_id=shard.id,
        video=blob,
        video_sha256=sha256,
        file_name=uri,
        caption=caption,
        metadata=metadata,
    )


def _caption(row: dict[str, Any], column: str | None) -> str:
    """Text, a number as text, "" for null. ClipError(BAD_CAPTION) for what would be stored as words nobody wrote."""
    value = row[column] if column is not None else None
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float | Decimal) and math.isfinite(value):
        return str(value)
    message = f"caption column {column!r}: expected text, got {type(value).__name__} {value!r}"
    raise ClipError(RejectionClass.BAD_CAPTION, "read", message)


def _json_types(row: dict[str, Any]) -> dict[str, Any]:
    """The row with dates, decimals and bytes as text; ClipError(BAD_METADATA) if text is not UTF-8."""
    try:
        return plain_json(json.dumps(row, default=str, ensure_ascii=False))
    except (ValueError, RecursionError) as error:
        raise ClipError(RejectionClass.BAD_METADATA, "read", f"row: {error}") from error


def _resolve(uri: str, spec: TableSource) -> str:
    if "://" in uri or uri.startswith("/"):
        return uri
    root = spec.root if spec.root is not None else spec.url.rpartition("/")[0]
    return f"{root.rstrip('/')}/{uri}" if root else uri
