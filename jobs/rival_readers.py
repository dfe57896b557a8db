"""The readers that jobs/bench_reader.py times, ours and others': who writes their format, and a stream of batches.

All give the same: the raw stored numbers of `BATCH` windows of one shape in one torch tensor, with their captions, in
shuffled order. Other libraries leave the sorting by shape to their user: `batched` does it for all of them.
Their packages are imported where they are used, so that one that is missing costs its own row only. MosaicML
Streaming and LitData come into a folder of their own on first use, as for the tests.
"""

# packages of other projects, some without types, some not installed everywhere
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from __future__ import annotations

import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from pipeline.reader import LatentDataset

BATCH = 64
BUFFER_ROWS = 1000
"""Of the shuffle buffers of readers that have one."""
CHUNK_BYTES = 64 << 20
Batches = Iterator[tuple[Tensor, list[str]]]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a dataset is: a folder or an s3:// URL, with the server's address and a scratch folder for caches."""

    url: str
    scratch: str
    endpoint: str | None = None
    names: tuple[str, ...] = ()
    """Of the payload files of our formats."""
    shards: tuple[str, ...] = ()
    """The same as paths or URLs, for readers that take those."""

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": self.endpoint} if self.endpoint else {}


@dataclass(frozen=True, slots=True)
class Reader:
    """One row of the benchmark."""

    name: str
    format: str
    """Folder of the dataset that it reads."""
    read: Callable[[Place, int], Batches]
    """(place, batches to skip) -> the rest of an epoch."""
    write: Callable[[Iterable[dict[str, Any]], Path], None] | None = None
    """Convert rows (id, caption, latent) to its format; None for ours."""
    resume: str = field(default="state")
    """How it skips: by a saved state, or by reading."""
    from_store: bool = True


def batched(samples: Iterable[tuple[np.ndarray, str]]) -> Batches:
    """Sort samples by shape and stack them; what is less than a batch at the end is left out, as ours does."""
    waiting: dict[tuple[int, ...], list[tuple[np.ndarray, str]]] = {}
    for latent, caption in samples:
        group = waiting.setdefault(latent.shape, [])
        group.append((latent, caption))
        if len(group) == BATCH:
            yield torch.from_numpy(np.stack([one for one, _ in group])), [text for _, text in group]
            group.clear()


# --- ours -----------------------------------------------------------------------------------------------------------


def ours_raw(place: Place, skip: int) -> Batches:
    dataset = LatentDataset(
        place.url, BATCH, start=skip, latents="raw", dtype=torch.float16, options=place.options or None
    )
    return ((batch.latents_BCTHW, batch.captions) for batch in dataset)


def ours_beyond_buffer(place: Place, skip: int) -> Batches:
    """As a dataset is read that is four times as large as the buffer. From a store it would need to be larger: a few
    hundred blocks, of the least size, are less than the lanes that end in them."""
    options = place.options or None
    nbytes = sum(bucket.nbytes for bucket in LatentDataset(place.url, BATCH, options=options).plan.buckets)
    dataset = LatentDataset(
        place.url,
        BATCH,
        start=skip,
        buffer_bytes=nbytes // 4,
        latents="raw",
        dtype=torch.float16,
        options=options,
    )
    return ((batch.latents_BCTHW, batch.captions) for batch in dataset)


def ours_normalized(place: Place, skip: int) -> Batches:
    dataset = LatentDataset(place.url, BATCH, start=skip, options=place.options or None)
    return ((batch.latents_BCTHW, batch.captions) for batch in dataset)


# --- webdataset, on our tars ---


def read_webdataset(place: Place, skip: int) -> Batches:
    import webdataset as wds

    urls = [f"pipe:curl -sf '{url}'" if url.startswith("http") else url for url in place.shards]
    dataset = wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False).shuffle(BUFFER_ROWS)
    samples = ((np.load(io.BytesIO(one["latent.npy"])), one["txt"].decode()) for one in dataset)
    return itertools.islice(batched(samples), skip, None)


# --- Hugging Face datasets, on our Parquet shards ---


def read_hf_datasets(place: Place, skip: int) -> Batches:
    from datasets import load_dataset

    columns = ["caption", "vae_latent_bytes", "vae_latent_shape"]
    options: dict[str, Any] = {"storage_options": place.options} if place.options else {}
    dataset = load_dataset(
        "parquet", data_files=[*place.shards], split="train", streaming=True, columns=columns, **options
    ).shuffle(seed=0, buffer_size=BUFFER_ROWS)
    samples = (
        (np.frombuffer(one["vae_latent_bytes"], np.float16).reshape(one["vae_latent_shape"]), one["caption"])
        for one in dataset.skip(skip * BATCH)
    )
    return batched(samples)


# --- MosaicML Streaming ---


def _find_streaming() -> None:
    _find_packages()
    if "streaming" not in sys.modules:
        from tests.foreign_readers import bare_streaming

        bare_streaming()


def _find_packages() -> None:
    """After all that is installed, so that nothing but what is missing comes from there."""
    from tests.foreign_readers import reader_packages

    folder = str(reader_packages())
    if folder not in sys.path:
        sys.path.append(folder)


def write_mds(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    _find_streaming()
    from streaming.base.format.mds.writer import MDSWriter

    columns = {"id": "str", "caption": "str", "latent": "ndarray:float16"}
    with MDSWriter(out=str(folder), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for row in rows:
            writer.write(row)


def read_mds(place: Place, skip: int) -> Batches:
    _find_streaming()
    from streaming.base.dataset import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    if place.endpoint:  # it knows of no other way; our own process
        os.environ["S3_ENDPOINT_URL"] = place.endpoint
    where = {"remote": place.url, "local": place.scratch} if place.endpoint else {"local": place.url}
    dataset = StreamingDataset(**where, shuffle=True, shuffle_seed=0, batch_size=BATCH)
    if skip:
        dataset.load_state_dict(
            {
                "epoch": 0,
                "sample_in_epoch": skip * BATCH,
                "num_canonical_nodes": 64,
                "shuffle_seed": 0,
                "initial_physical_nodes": 1,
            }
        )
    return batched((one["latent"], one["caption"]) for one in dataset)


# --- LitData ---


def write_litdata(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    _find_packages()
    from litdata.streaming.writer import BinaryWriter

    writer = BinaryWriter(str(folder), chunk_bytes=CHUNK_BYTES)
    for number, row in enumerate(rows):
        writer.add_item(number, row)
    writer.done()
    writer.merge(1)


def read_litdata(place: Place, skip: int) -> Batches:
    _find_packages()
    from litdata import StreamingDataset
    from litdata.streaming import downloader

    options: dict[str, Any] = {}
    if place.endpoint:
        options = {"storage_options": {"endpoint_url": place.endpoint}, "cache_dir": place.scratch}
        # its client in Rust refuses an endpoint without TLS, and none of LitData's options says otherwise
        cast(dict[str, Any], downloader._OBSTORE_CLIENT_OPTIONS)["allow_http"] = True
    dataset = StreamingDataset(place.url, shuffle=True, seed=0, **options)
    if skip:  # its state is for its own DataLoader; reading up to there is what is left without one
        return itertools.islice(batched((one["latent"], one["caption"]) for one in dataset), skip, None)
    return batched((one["latent"], one["caption"]) for one in dataset)


READERS: tuple[Reader, ...] = (
    Reader("ours, tars", "webdataset", ours_raw),
    Reader("ours, Parquet", "parquet", ours_raw),
    Reader("ours, tars, buffer of a quarter", "webdataset", ours_beyond_buffer, from_store=False),
    Reader("ours, tars, normalized float32", "webdataset", ours_normalized),
    Reader("webdataset", "webdataset", read_webdataset, resume="reads"),
    Reader("datasets, streaming", "parquet", read_hf_datasets, resume="reads"),
    Reader("MosaicML Streaming", "mds", read_mds, write=write_mds),
    Reader("LitData", "litdata", read_litdata, write=write_litdata, resume="reads"),
)
