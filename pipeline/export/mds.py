"""MosaicML Streaming's MDS, version 2, as LitData reads it too.

Written here because the mosaicml-streaming package demands an old numpy, torchvision and transformers. The layout:
uint32 number of samples, uint32 offset of each and of the end, the JSON of the columns, the samples; of a sample
first the uint32 size of each column that has no fixed one, then the columns by name. index.json lists the files.

Two things are as they are for LitData: files are compressed (it takes the zip_data of an entry, which only compressed
files have), and latents are a column of plain bytes (it knows no ndarray), which is also what carries bfloat16.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.documents import RunIdentity
from pipeline.errors import DatasetError
from pipeline.export.contract import ExportedFile, ReadBack, WrittenFile
from pipeline.formats.fields import fields_of
from pipeline.formats.header import canonical_line
from pipeline.formats.tensors import raw_bytes, tensor_from_raw
from pipeline.records import Latent

SIZE_LIMIT = 1 << 26
"""Bytes of a file before compression, unless one sample alone is larger: what Streaming writes by default."""
_MAX_OFFSET = (1 << 32) - 1
_COLUMNS = {
    "caption": "str",
    "fields": "str",
    "id": "str",
    "latent": "bytes",
    "latent_dtype": "str",
    "latent_shape": "str",
}
_CODEC = pa.Codec("zstd", compression_level=1)
"""Latents hardly compress: the level that costs least."""


@dataclass(frozen=True, slots=True)
class MDSExport:
    """EXPORTS["mds"]: BUCKET/SHARD.NUMBER.mds.zstd and BUCKET/index.json."""

    name: str = "mds"
    size_limit: int = SIZE_LIMIT

    def check(self, identity: RunIdentity, *, with_logvar: bool) -> None:
        """Everything has a place in it."""

    def write(self, folder: Path, stem: str, latents: Iterable[Latent]) -> list[WrittenFile]:
        files: list[WrittenFile] = []
        for samples, columns in self._files(latents):
            raw = self._encode(samples, columns)
            zipped = _CODEC.compress(raw, asbytes=True)
            name = f"{stem}.{len(files):05d}.mds"
            path = folder / f"{name}.zstd"
            path.write_bytes(zipped)
            entry = {
                **self._config(columns),
                "raw_data": _described(name, raw),
                "zip_data": _described(path.name, zipped),
                "samples": len(samples),
            }
            files.append(WrittenFile(path=path, rows=len(samples), entry=entry))
        return files

    def read(self, path: Path) -> Iterator[ReadBack]:
        raw = _decompress(path)
        count = int(np.frombuffer(raw, "<u4", 1)[0])
        offsets = np.frombuffer(raw, "<u4", count + 1, offset=4).tolist()
        config = json.loads(raw[4 * (count + 2) : offsets[0]])
        if offsets[-1] != len(raw):
            raise DatasetError(f"{path.name}: expected {offsets[-1]} bytes, got {len(raw)}")
        for start, stop in itertools.pairwise(offsets):
            yield _read_sample(raw[start:stop], config["column_names"], path.name)

    def index(self, files: Sequence[ExportedFile]) -> dict[str, bytes]:
        return {"index.json": canonical_line({"version": 2, "shards": [file.entry for file in files]}).encode()}

    def _files(self, latents: Iterable[Latent]) -> Iterator[tuple[list[bytes], dict[str, str]]]:
        """Samples of one file, and its columns."""
        samples: list[bytes] = []
        size, columns = 0, _COLUMNS
        for latent in latents:
            columns = _COLUMNS if latent.logvar_CTHW is None else {**_COLUMNS, "logvar": "bytes"}
            sample = _encode_sample(latent, columns)
            if samples and size + len(sample) > self.size_limit:
                yield samples, columns
                samples, size = [], 0
            samples.append(sample)
            size += len(sample)
        if samples:
            yield samples, columns

    def _encode(self, samples: Sequence[bytes], columns: dict[str, str]) -> bytes:
        config = canonical_line(self._config(columns)).encode()
        offsets = np.cumsum([4 * (len(samples) + 2) + len(config), *map(len, samples)])
        if offsets[-1] > _MAX_OFFSET:
            raise DatasetError(f"format mds: expected files below {_MAX_OFFSET} bytes, got one of {offsets[-1]}")
        head = np.asarray([len(samples), *offsets], "<u4").tobytes()
        return b"".join((head, config, *samples))

    def _config(self, columns: dict[str, str]) -> dict[str, Any]:
        names = sorted(columns)
        return {
            "version": 2,
            "format": "mds",
            "compression": "zstd",
            "hashes": ["sha256"],
            "size_limit": self.size_limit,
            "column_names": names,
            "column_encodings": [columns[name] for name in names],
            "column_sizes": [None] * len(names),
        }


def _described(name: str, data: bytes) -> dict[str, Any]:
    return {"basename": name, "bytes": len(data), "hashes": {"sha256": hashlib.sha256(data).hexdigest()}}


def _encode_sample(latent: Latent, columns: dict[str, str]) -> bytes:
    row = latent.row
    values = {
        "caption": row.caption.encode(),
        "fields": canonical_line(fields_of(row)).encode(),
        "id": row.key.encode(),
        "latent": raw_bytes(latent.mean_CTHW),
        "latent_dtype": row.latent_dtype.encode(),
        "latent_shape": ",".join(map(str, row.latent_shape)).encode(),
    }
    if latent.logvar_CTHW is not None:
        values["logvar"] = raw_bytes(latent.logvar_CTHW)
    data = [values[name] for name in sorted(columns)]
    return b"".join((np.asarray([len(value) for value in data], "<u4").tobytes(), *data))


def _read_sample(sample: bytes, names: Sequence[str], where: str) -> ReadBack:
    sizes = np.frombuffer(sample, "<u4", len(names)).tolist()
    ends = (4 * len(names) + np.cumsum(sizes)).tolist()
    columns = {name: sample[end - size : end] for name, size, end in zip(names, sizes, ends)}
    if ends[-1] != len(sample):
        raise DatasetError(f"{where}: expected a sample of {ends[-1]} bytes, got {len(sample)}")
    dtype = columns["latent_dtype"].decode()
    shape = [int(side) for side in columns["latent_shape"].decode().split(",")]
    logvar = columns.get("logvar")
    return ReadBack(
        key=columns["id"].decode(),
        caption=columns["caption"].decode(),
        mean_CTHW=tensor_from_raw(columns["latent"], dtype, shape, where),
        logvar_CTHW=None if logvar is None else tensor_from_raw(logvar, dtype, shape, where),
    )


def _decompress(path: Path) -> bytes:
    """All of it: a file has SIZE_LIMIT bytes unless one latent has more."""
    with pa.CompressedInputStream(pa.OSFile(str(path)), "zstd") as stream:
        return stream.read()
