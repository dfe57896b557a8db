"""A shard as a WebDataset tar, written by the webdataset library. The one door to it.

Per sample KEY.json, KEY.latent.npy|safetensors, KEY.logvar.npy|safetensors if stored, KEY.txt, in this order. The
shard's header is a PAX global header record before the first member: every tar reader accepts it, none takes it
for a sample. mtime, uid, gid, mode and owner are fixed, so equal latents give equal bytes.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from torch import Tensor
from webdataset.writer import TarWriter

from pipeline.errors import DatasetError
from pipeline.formats.contract import IndexRow, PayloadPlace, accepted, tensor_problem, verified
from pipeline.formats.fields import fields_of, row_from
from pipeline.formats.header import HEADER_KEY, ShardHeader, canonical_line, name_of
from pipeline.formats.tensors import dtype_name, file_suffix, read_payload, tensor_file
from pipeline.records import Latent

EMPTY_MEMBER = "__empty__"
"""The only member of a shard without samples: Python's tarfile refuses a global header with nothing after it."""
_END_OF_ARCHIVE = bytes(2 * tarfile.BLOCKSIZE)
_SAMPLE_FILE = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)  # the webdataset rule: cut at the first dot
_BROKEN_TAR = (tarfile.TarError, ValueError, OverflowError, EOFError)


@dataclass(frozen=True, slots=True)
class WebDatasetFormat:
    """FORMATS["webdataset"]."""

    name: str = "webdataset"
    suffix: str = ".tar"
    padded_to: int = tarfile.RECORDSIZE

    def write(self, path: Path, latents: Iterable[Latent], header: ShardHeader) -> list[PayloadPlace]:
        places: list[PayloadPlace] = []
        with (
            path.open("wb") as file,
            TarWriter(file, user="", group="", mode=0o644, mtime=0, encoder=False) as writer,
        ):
            _write_header(writer, header)
            for latent in accepted(latents, header):
                places.append(_write_sample(writer, latent))
            if not places:
                writer.tarstream.addfile(_empty_member(), io.BytesIO())
        return places

    def read_header(self, file: BinaryIO) -> ShardHeader:
        with _open_tar(file) as tar:
            return _header(tar, name_of(file))

    def read(self, file: BinaryIO) -> Iterator[Latent]:
        where = name_of(file)
        with _open_tar(file) as tar:
            samples = (_latent(key, members, where) for key, members in _samples(_members(tar, file, where), where))
            yield from verified(samples, _header(tar, where), where)

    def fetch(self, file: BinaryIO, rows: Sequence[IndexRow]) -> Iterator[Latent]:
        for row in rows:
            where = f"{name_of(file)}: {row.row.key}"
            mean = _read_span(file, row.latent_offset, row.latent_length, where)
            if mean is None:
                raise DatasetError(f"{where}: its index row has no byte offset")
            logvar = _read_span(file, row.logvar_offset, row.logvar_length, where)
            latent = Latent(row=row.row, mean_CTHW=mean, logvar_CTHW=logvar)
            problem = tensor_problem(latent)
            if problem is not None:
                raise DatasetError(f"{where}: {problem}")
            yield latent


def _write_header(writer: TarWriter, header: ShardHeader) -> None:
    # TarWriter opens its tar itself and takes no pax_headers: write the record as tarfile.open would have.
    record = tarfile.TarInfo.create_pax_global_header({HEADER_KEY: header.to_json()})
    writer.tarstream.fileobj.write(record)
    writer.tarstream.offset += len(record)


def _empty_member() -> tarfile.TarInfo:
    member = tarfile.TarInfo(EMPTY_MEMBER)
    member.mode = 0o644
    return member


def _write_sample(writer: TarWriter, latent: Latent) -> PayloadPlace:
    row = latent.row
    suffix = file_suffix(row.latent_dtype)
    logvar: tuple[int | None, int | None] = (None, None)
    _write_file(writer, row.key, "json", canonical_line(fields_of(row)).encode("ascii"))
    mean = _write_file(writer, row.key, f"latent.{suffix}", tensor_file(latent.mean_CTHW, "latent"))
    if latent.logvar_CTHW is not None:
        suffix = file_suffix(dtype_name(latent.logvar_CTHW.dtype))
        logvar = _write_file(writer, row.key, f"logvar.{suffix}", tensor_file(latent.logvar_CTHW, "logvar"))
    _write_file(writer, row.key, "txt", row.caption.encode("utf-8"))
    _forget_members(writer.tarstream)
    return PayloadPlace(
        latent_offset=mean[0], latent_length=mean[1], logvar_offset=logvar[0], logvar_length=logvar[1]
    )


def _write_file(writer: TarWriter, key: str, extension: str, data: bytes) -> tuple[int, int]:
    """Offset and length of the file's bytes in the tar."""
    writer.write({"__key__": key, extension: data})
    blocks = -(-len(data) // tarfile.BLOCKSIZE)
    return writer.tarstream.offset - blocks * tarfile.BLOCKSIZE, len(data)


def _forget_members(tar: tarfile.TarFile) -> None:
    """Without this a TarFile keeps every member's header until it is closed."""
    tar.members.clear()  # type: ignore[attr-defined] - absent from typeshed


@contextlib.contextmanager
def _open_tar(file: BinaryIO) -> Iterator[tarfile.TarFile]:
    file.seek(0)
    try:
        tar = tarfile.open(fileobj=file, mode="r:")  # noqa: SIM115 - closed below
    except _BROKEN_TAR as error:
        raise DatasetError(f"{name_of(file)}: not a whole tar: {error}") from error
    with tar:
        yield tar


def _header(tar: tarfile.TarFile, where: str) -> ShardHeader:
    record = tar.pax_headers.get(HEADER_KEY)
    if record is None:
        raise DatasetError(f"{where}: no {HEADER_KEY} record at its start: not a latent shard")
    return ShardHeader.from_bytes(record.encode("utf-8", "surrogateescape"), f"{where}: {HEADER_KEY}")


def _members(tar: tarfile.TarFile, file: BinaryIO, where: str) -> Iterator[tuple[str, bytes]]:
    """(name, bytes) of the members. DatasetError if the tar ends or breaks before its end marker."""
    end = tar.offset
    while True:
        try:
            member = tar.next()
        except _BROKEN_TAR as error:
            raise DatasetError(f"{where}: broken after byte {end}: {error}") from error
        if member is None:
            break
        _forget_members(tar)
        if not member.isreg() or member.issparse() or member.size < 0:
            raise DatasetError(f"{where}: {member.name}: expected a plain file, got tar member type {member.type!r}")
        end = tar.offset
        file.seek(member.offset_data)
        data = file.read(member.size)
        if len(data) != member.size:
            raise DatasetError(f"{where}: {member.name}: expected {member.size} bytes, the tar has {len(data)} left")
        if member.name != EMPTY_MEMBER:
            yield member.name, data
    # tarfile takes a broken header, or a cut between two members, for the end of the archive
    file.seek(end)
    if file.read(len(_END_OF_ARCHIVE)) != _END_OF_ARCHIVE:
        raise DatasetError(f"{where}: truncated or broken: no end-of-archive marker at byte {end}")


def _samples(members: Iterable[tuple[str, bytes]], where: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """(key, extension -> bytes) for each run of members with one key."""
    key, files = "", dict[str, bytes]()
    for name, data in members:
        match = _SAMPLE_FILE.fullmatch(name)
        if match is None:
            raise DatasetError(f"{where}: {name}: expected KEY.EXTENSION")
        if files and match[1] != key:
            yield key, files
            files = {}
        key = match[1]
        if match[2] in files:
            raise DatasetError(f"{where}: {name}: there twice")
        files[match[2]] = data
    if files:
        yield key, files


def _latent(key: str, files: dict[str, bytes], where: str) -> Latent:
    where = f"{where}: {key}"
    if "json" not in files:
        raise DatasetError(f"{where}: no {key}.json")
    row = row_from(_parse_json(files["json"], f"{where}.json"), f"{where}.json")
    suffix = file_suffix(row.latent_dtype)
    latent_file = f"latent.{suffix}"
    logvar_file = "logvar.npy" if "logvar.npy" in files else f"logvar.{suffix}"  # int8 is npy beside bfloat16, too
    expected = {"json", "txt", latent_file} | ({logvar_file} if row.has_logvar else set())
    if files.keys() != expected:
        raise DatasetError(f"{where}: expected files {sorted(expected)}, got {sorted(files)}")
    if row.key != key:
        raise DatasetError(f"{where}.json: id: expected {key}, got {row.key}")
    if row.caption.encode() != files["txt"]:
        raise DatasetError(f"{where}.txt: not the caption of {key}.json")
    return Latent(
        row=row,
        mean_CTHW=read_payload(files[latent_file], f"{where}.{latent_file}"),
        logvar_CTHW=read_payload(files[logvar_file], f"{where}.{logvar_file}") if row.has_logvar else None,
    )


def _parse_json(data: bytes, where: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{where}: not JSON: {error}") from error


def _read_span(file: BinaryIO, offset: int | None, length: int | None, where: str) -> Tensor | None:
    if offset is None or length is None:
        return None
    file.seek(offset)
    return read_payload(file.read(length), where)
