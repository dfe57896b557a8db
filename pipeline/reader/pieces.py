"""Pieces of shards: the reads behind a batch, for both formats, from a disk, a store or through the cache.

A piece is one range of a WebDataset tar, or one of each payload column of a Parquet shard. Where it is says the
shard's index (and for Parquet the page headers); those of the shards used last are kept in memory. From a store a
piece is fetched whole. Of a local file the system is told to read it ahead, and its rows are copied when they are
wanted: the piece is then in the system's page cache and nowhere else.
"""

from __future__ import annotations

import functools
import hashlib
import io
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.dataset import describe_stored, index_name, shard_name
from pipeline.errors import DatasetError
from pipeline.formats import FORMATS, blob_offsets, read_index_columns, read_payload
from pipeline.reader.cache import RangeCache
from pipeline.reader.catalog import Catalog
from pipeline.reader.plan import Piece
from pipeline.reader.row_bytes import FetchedBytes, FileBytes, OpenFiles, RowBytes, spans
from pipeline.reader.texts import TextColumn
from pipeline.storage import Store

INDEX_BYTES = 256 << 20
"""Of indexes in memory, per process."""
LENGTH_BYTES = 4
"""Of a value in a Parquet page, before its bytes."""
_TEXTS = ("id", "caption")
_MEAN, _LOGVAR = ("latent_offset", "latent_length"), ("logvar_offset", "logvar_length")


@dataclass(frozen=True, slots=True)
class _Column:
    """Where the mean, or the log variance, of each row of a shard is: int64 (rows,)."""

    offset: np.ndarray
    length: np.ndarray
    dtype: torch.dtype
    prefixes: dict[str, tuple[bytes, int]] = field(default_factory=dict)
    """Of each bucket, what stands before a row's numbers, and how many bytes those are."""


@dataclass(frozen=True, slots=True)
class _ShardRows:
    """What is kept of a shard's index."""

    where: str
    """The shard's URL."""
    table: pa.Table
    """The columns that were asked for."""
    keys: TextColumn
    captions: TextColumn
    mean: _Column
    logvar: _Column | None

    @property
    def nbytes(self) -> int:
        columns = [self.mean, *([self.logvar] if self.logvar else [])]
        numbers = sum(column.offset.nbytes + column.length.nbytes for column in columns)
        return self.table.nbytes + self.keys.nbytes + self.captions.nbytes + numbers


@dataclass(frozen=True, slots=True)
class LoadedPiece:
    """A piece that can be read. Rows are counted from its first one."""

    shard_id: str
    keys: list[str]
    captions: list[str]
    columns: dict[str, list[Any]]
    """Fields of the index that were asked for, as Python has them."""
    mean: RowBytes
    logvar: RowBytes | None


class PieceReader:
    """Reads pieces of one dataset; safe to use from several threads of one process."""

    def __init__(
        self,
        catalog: Catalog,
        store: Store,
        *,
        columns: Sequence[str] = (),
        logvar: bool = False,
        cache: RangeCache | None = None,
        checksums: bool = False,
    ) -> None:
        """`columns` of the index to have beside keys and captions; `checksums` reads a whole shard before the first
        piece of it, and compares its sha256 with the manifest's."""
        self._catalog, self._store, self._cache = catalog, store, cache
        self._columns = tuple(dict.fromkeys(columns))
        self._want_logvar, self._checksums = logvar, checksums
        self._files = OpenFiles(lambda number: store.open_local(self._shard_name(number)))
        self._shards: OrderedDict[int, Future[_ShardRows]] = OrderedDict()
        self._kept_bytes = 0
        self._lock = threading.Lock()

    @property
    def fetches(self) -> bool:
        """Whether a piece's numbers are fetched when it is loaded. Else they are when they are wanted, and loading it
        tells the system to read them ahead."""
        return not self._store.is_local

    def load(self, piece: Piece, bucket: str) -> LoadedPiece:
        """DatasetError, FileNotFoundError or StorageError, all with the shard's name, if it cannot be read."""
        shard = self._catalog.manifest.shards[piece.shard]
        rows = self._shard_rows(piece.shard)
        where = rows.where
        keys, captions = (column.rows(piece.first, piece.stop) for column in (rows.keys, rows.captions))
        columns = {}
        if self._columns:
            table = rows.table.slice(piece.first, piece.stop - piece.first)
            columns = {name: table.column(name).to_pylist() for name in self._columns}
        read = self._in_file if self._store.is_local else self._fetched
        mean, *logvar = read(piece, bucket, [rows.mean, *([rows.logvar] if rows.logvar else [])], where)
        return LoadedPiece(shard.id, keys, captions, columns, mean, logvar[0] if logvar else None)

    # --- numbers -------------------------------------------------------------------------------------------------

    def _in_file(self, piece: Piece, bucket: str, columns: Sequence[_Column], where: str) -> Iterator[RowBytes]:
        file = self._files.get(piece.shard)
        for column in columns:
            first, stop = self._span(piece, column, where)
            prefix, nbytes = self._prefix(piece, bucket, column, where)
            starts = (column.offset[piece.first : piece.stop] + self._shift(prefix)).tolist()
            for begin, end in spans(starts, nbytes):
                file.will_need(max(first, begin - len(prefix)), min(stop, end))
            yield FileBytes(file, functools.partial(self._files.get, piece.shard), starts, prefix, where)

    def _fetched(self, piece: Piece, bucket: str, columns: Sequence[_Column], where: str) -> Iterator[RowBytes]:
        ranges = [self._span(piece, column, where) for column in columns]
        if self._catalog.manifest.format == "webdataset":  # both lie side by side, row by row
            ranges = [(min(start for start, _ in ranges), max(stop for _, stop in ranges))] * len(ranges)
        data = {one: memoryview(self._read(piece.shard, *one, where)) for one in dict.fromkeys(ranges)}
        for (start, stop), column in zip(ranges, columns, strict=True):
            numbers = data[start, stop]
            at = int(column.offset[piece.first]) - start
            first = numbers[at : at + int(column.length[piece.first])]
            prefix, _ = self._prefix(piece, bucket, column, where, first)
            starts = column.offset[piece.first : piece.stop] + self._shift(prefix) - start
            yield FetchedBytes(numbers, starts.tolist(), prefix, where)

    def _shift(self, prefix: bytes) -> int:
        """From a row's offset in the index to its numbers: an index of a tar has the file with its header."""
        return len(prefix) if self._catalog.manifest.format == "webdataset" else 0

    def _span(self, piece: Piece, column: _Column, where: str) -> tuple[int, int]:
        """(start, stop) of a column's bytes, with what stands before the first row's numbers."""
        start = int(column.offset[piece.first])
        stop = int(column.offset[piece.stop - 1] + column.length[piece.stop - 1])
        if self._catalog.manifest.format == "parquet":
            start -= LENGTH_BYTES
        size = self._catalog.manifest.shards[piece.shard].size
        if not 0 <= start < stop <= size:
            raise DatasetError(f"{where}: its index leads to bytes {start} to {stop} of {size}")
        return start, stop

    def _prefix(
        self, piece: Piece, bucket: str, column: _Column, where: str, first: memoryview | None = None
    ) -> tuple[bytes, int]:
        """What stands before each row's numbers, and how many bytes those are.

        In a tar, the header of the first row's file, which is checked here: `first`, or else read now.
        """
        lengths = column.length[piece.first : piece.stop]
        if (lengths != lengths[0]).any():
            raise DatasetError(f"{where}: latents of bucket {bucket} with different lengths in its index")
        if bucket not in column.prefixes:
            start, length = int(column.offset[piece.first]), int(lengths[0])
            shape = self._catalog.latent_shape(bucket)
            nbytes = int(np.prod(shape)) * column.dtype.itemsize
            if self._catalog.manifest.format == "parquet":
                if length != nbytes:
                    raise DatasetError(
                        f"{where}: expected {nbytes} bytes for a latent of shape {shape}, got {length}"
                    )
                column.prefixes[bucket] = nbytes.to_bytes(LENGTH_BYTES, "little"), nbytes
            else:
                data = bytes(first) if first is not None else self._read(piece.shard, start, start + length, where)
                _require(read_payload(data, where), column.dtype, shape, where)
                column.prefixes[bucket] = data[: len(data) - nbytes], nbytes
        prefix, nbytes = column.prefixes[bucket]
        if self._shift(prefix) + nbytes != lengths[0]:
            raise DatasetError(f"{where}: a latent of bucket {bucket} with {lengths[0]} bytes in its index")
        return prefix, nbytes

    def _read(self, number: int, start: int, stop: int, where: str) -> bytes:
        data = self._range(number, start, stop)
        if len(data) != stop - start:
            size = self._catalog.manifest.shards[number].size
            raise DatasetError(f"{where}: truncated: ends before byte {stop}; its receipt says {size}")
        return data

    def _range(self, number: int, start: int, stop: int) -> bytes:
        shard, name = self._catalog.manifest.shards[number], self._shard_name(number)
        if self._cache is None:
            return self._store.read_range(name, start, stop)
        return self._cache.read(
            shard.sha256, shard.size, start, stop, lambda first, last: self._store.read_range(name, first, last)
        )

    # --- indexes -------------------------------------------------------------------------------------------------

    def _shard_name(self, number: int) -> str:
        manifest = self._catalog.manifest
        return shard_name(manifest.shards[number].id, FORMATS[manifest.format].suffix)

    def _shard_rows(self, number: int) -> _ShardRows:
        """Loaded by the first thread that asks; the others wait for it."""
        with self._lock:
            if (known := self._shards.get(number)) is None:
                future = self._shards[number] = Future()
            else:
                self._shards.move_to_end(number)
                future = None
        if future is None:
            assert known is not None
            return known.result()
        try:
            rows = self._load_shard(number)
        except BaseException as error:  # Ctrl-C too: others wait for this future, and it is raised again here
            future.set_exception(error)
            with self._lock:
                del self._shards[number]
            raise
        future.set_result(rows)
        self._forget_oldest(rows.nbytes)
        return rows

    def _forget_oldest(self, added: int) -> None:
        with self._lock:
            self._kept_bytes += added
            for number in list(self._shards)[:-1]:
                if self._kept_bytes <= INDEX_BYTES:
                    return
                if self._shards[number].done():
                    self._kept_bytes -= self._shards.pop(number).result().nbytes

    def _load_shard(self, number: int) -> _ShardRows:
        manifest = self._catalog.manifest
        shard, index = manifest.shards[number], index_name(manifest.shards[number].id)
        if self._checksums:
            self._check_sha256(number)
        names = list(dict.fromkeys((*self._columns, *_TEXTS, "bucket", *_MEAN, *_LOGVAR)))
        where = self._store.full_url(index)
        info, table = _index_table(self._index_bytes(number), names, where)
        if info.header.fingerprint != manifest.fingerprint and "mixed" not in self._catalog.tolerate:
            raise DatasetError(
                f"{where}: mixed: expected identity {manifest.fingerprint}, as the manifest has, "
                f"got {info.header.fingerprint}; read it all the same with tolerate=['mixed']"
            )
        if (info.header.shard_id, info.shard_sha256, table.num_rows) != (
            shard.id,
            shard.sha256,
            sum(shard.rows.values()),
        ):
            raise DatasetError(f"{where}: not the index of the shard {shard.id} that the manifest lists")
        _require_buckets(table.column("bucket"), shard.rows, where)
        read = functools.cache(functools.partial(self._range, number))  # both columns begin at the footer
        mean = self._places(number, table, read, "vae_latent_bytes", self._catalog.dtype, *_MEAN)
        logvar = None
        if self._want_logvar:
            logvar = self._places(number, table, read, "vae_logvar_bytes", self._catalog.logvar_dtype, *_LOGVAR)
        url = self._store.full_url(self._shard_name(number))
        keys, captions = (TextColumn.of(table.column(name), f"{where}: {name}") for name in _TEXTS)
        return _ShardRows(url, table.select(list(self._columns)), keys, captions, mean, logvar)

    def _index_bytes(self, number: int) -> bytes:
        """A whole index: one read of a store, and with a cache none the next time."""
        shard = self._catalog.manifest.shards[number]
        name = index_name(shard.id)
        if self._cache is None or (info := self._store.info(name)) is None or info.size is None:
            return self._store.read_bytes(name)
        # named by the shard whose index it is, since the manifest has no digest of the index itself
        content = hashlib.sha256(f"index of {shard.sha256} {info.size}".encode()).hexdigest()
        return self._cache.read(
            content, info.size, 0, info.size, lambda first, last: self._store.read_range(name, first, last)
        )

    def _places(
        self,
        number: int,
        table: pa.Table,
        read: Callable[[int, int], bytes],
        blob: str,
        dtype: torch.dtype,
        offset: str,
        length: str,
    ) -> _Column:
        where = self._store.full_url(self._shard_name(number))
        if self._catalog.manifest.format == "parquet":
            nbytes = {
                name: int(np.prod(self._catalog.latent_shape(name))) * dtype.itemsize
                for name in table.column("bucket").unique().to_pylist()
            }
            lengths = np.asarray([nbytes[name] for name in table.column("bucket").to_pylist()], np.int64)
            size = self._catalog.manifest.shards[number].size
            return _Column(blob_offsets(read, size, blob, lengths.tolist(), where), lengths, dtype)
        if table.column(offset).null_count or table.column(length).null_count:
            raise DatasetError(f"{where}: its index has rows without {offset}")
        return _Column(table.column(offset).to_numpy(), table.column(length).to_numpy(), dtype)

    def _check_sha256(self, number: int) -> None:
        shard, name = self._catalog.manifest.shards[number], self._shard_name(number)
        found = describe_stored(self._store, name)
        if (found.sha256, found.size) != (shard.sha256, shard.size):
            raise DatasetError(
                f"{self._store.full_url(name)}: expected {shard.size} bytes with sha256 {shard.sha256}, "
                f"got {found.size} with {found.sha256}"
            )


def _require_buckets(column: pa.ChunkedArray, rows: Mapping[str, int], where: str) -> None:
    """The rows of every bucket lie where a catalog has them, from the manifest's numbers alone."""
    first = 0
    for name, count in sorted(rows.items()):
        if column.slice(first, count).unique().to_pylist() != [name][:count]:
            raise DatasetError(f"{where}: rows {first} to {first + count} are not of bucket {name}")
        first += count


def _require(tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], where: str) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise DatasetError(f"{where}: expected {dtype} {list(shape)}, got {tensor.dtype} {list(tensor.shape)}")


def _index_table(content: bytes, names: list[str], where: str) -> tuple[Any, pa.Table]:
    file = io.BytesIO(content)
    try:
        return read_index_columns(file, names)
    except DatasetError as error:
        raise DatasetError(f"{where}: {error}") from error
