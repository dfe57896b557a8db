"""Latents of every kind that a shard may have to hold, made without a VAE."""

from __future__ import annotations

import hashlib
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st

from pipeline.formats import FORMATS, IndexRow, PayloadPlace, ShardHeader, write_index
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.logvar_code import logvar_to_int8
from pipeline.records import Latent, LatentRow, SourceVideo, pair_sha256

HEADER = ShardHeader(
    shard_id="00012",
    fingerprint=hashlib.sha256(b"identity").hexdigest(),
    numerics={"device": "cpu", "threads": 1, "libraries": {"torch": "2.13.0"}},
    vae={
        "name": "made",
        "latent_channels": 4,
        "time_stride": 4,
        "space_stride": 8,
        "scaling_factor": 0.18215,
        "shift_factor": 0.0,
    },
)
SIZES = ((5, 16, 16), (17, 16, 16), (17, 16, 32), (33, 24, 16))
"""(T, H, W) of the buckets, not in the order of anything."""


def make_latent(
    key: str = "clip_00000",
    *,
    dtype: str = "float16",
    logvar: bool | str = False,
    size: tuple[int, int, int] = (17, 16, 16),
    **fields: Any,
) -> Latent:
    """A latent whose numbers are a function of its key; `fields` replace those of its row. logvar "int8": coded."""
    time, height, width = size
    shape = (4, 1 + (time - 1) // 4, height // 8, width // 8)
    generator = torch.Generator().manual_seed(int(hashlib.sha256(key.encode()).hexdigest()[:8], 16))
    mean, variance = (torch.randn(shape, generator=generator).to(TORCH_DTYPES[dtype]) for _ in range(2))  # type: ignore[index]
    caption = fields.get("caption", f"a caption of {key}")
    row = LatentRow(
        key=key,
        clip_key=key[:-6],
        window_index=0,
        shard_id="00012",
        num_frames=time,
        height=height,
        width=width,
        latent_shape=shape,
        latent_dtype=dtype,
        has_logvar=bool(logvar),
        caption=caption,
        file_name=f"{key[:-6]}.mp4",
        fps=25.0,
        duration_sec=time / 25,
        frame_indices=tuple(range(3, 3 + time)),
        frame_times=tuple((3 + frame) / 25 for frame in range(time)),
        padded_frames=0,
        trimmed_frames=0,
        crop=(10.0, 0.0, 200.5, 200.5),
        source=SourceVideo(
            width=320,
            height=240,
            sample_aspect_ratio=1.0,
            rotation=0,
            fps=25.0,
            duration=12.5,
            codec="h264",
            decoder="pyav-18.1.0",
        ),
        pair_sha256=pair_sha256(key[:-6], "00" * 32, caption),
        video_sha256="00" * 32,
        metadata={"url": "https://example.org/video?v=1", "views": 12, "nested": {"tags": ["a", None, 1.5]}},
    )
    variance = logvar_to_int8(variance) if logvar == "int8" else variance
    return Latent(row=replace(row, **fields), mean_CTHW=mean, logvar_CTHW=variance if logvar else None)


def stored_order(latents: list[Latent]) -> list[Latent]:
    return sorted(latents, key=lambda latent: latent.row.sort_key)


def make_latents(count: int = 6, *, dtype: str = "float16", logvar: bool | str = False) -> list[Latent]:
    """Several buckets, folders in keys, Unicode, an empty caption; in stored order."""
    names = ["a/0", "a/1", "b/ключ", "c", "d/v1.2/e", "f", "g", "h"]
    return stored_order(
        [
            make_latent(
                f"{names[number % len(names)]}{number}_00000",
                dtype=dtype,
                logvar=logvar,
                size=SIZES[number % len(SIZES)],
                caption="" if number == 1 else f"caption {number}: 🐙 naïve\nsecond line",
            )
            for number in range(count)
        ]
    )


def write_shard(folder: Path, format_name: str, latents: list[Latent]) -> tuple[Path, list[PayloadPlace]]:
    shard_format = FORMATS[format_name]  # type: ignore[index]
    path = folder / f"00012{shard_format.suffix}"
    return path, shard_format.write(path, iter(latents), HEADER)


def write_dataset(folder: Path, format_name: str, latents: list[Latent]) -> tuple[Path, Path]:
    """shards/00012.* and index/00012.parquet under a new folder."""
    (folder / "shards").mkdir(parents=True)
    (folder / "index").mkdir()
    shard, places = write_shard(folder / "shards", format_name, latents)
    index = folder / "index" / "00012.parquet"
    data = shard.read_bytes()
    write_index(
        index,
        [latent.row for latent in latents],
        places,
        header=HEADER,
        shard_sha256=hashlib.sha256(data).hexdigest(),
        shard_size=len(data),
    )
    return shard, index


def index_rows(latents: list[Latent], places: list[PayloadPlace]) -> list[IndexRow]:
    return [
        IndexRow(
            row=latent.row,
            row_number=number,
            **{name: getattr(place, name) for name in PayloadPlace.__dataclass_fields__},
        )
        for number, (latent, place) in enumerate(zip(latents, places, strict=True))
    ]


def read_bytes(format_name: str, data: bytes) -> list[Latent]:
    return list(FORMATS[format_name].read(io.BytesIO(data)))  # type: ignore[index]


def assert_same(found: list[Latent], expected: list[Latent]) -> None:
    """Rows equal, numbers equal to the bit."""
    assert [latent.row for latent in found] == [latent.row for latent in expected]
    for one, other in zip(found, expected, strict=True):
        for a, b in ((one.mean_CTHW, other.mean_CTHW), (one.logvar_CTHW, other.logvar_CTHW)):
            assert (a is None) == (b is None)
            if a is not None and b is not None:
                assert a.dtype == b.dtype
                assert a.shape == b.shape
                assert a.is_contiguous()
                assert torch.equal(a.view(torch.uint8), b.contiguous().view(torch.uint8))


# What a source may hand us. Text is anything that UTF-8 can carry; JSON strings may be worse than that.
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
numbers = st.floats(allow_nan=False, allow_infinity=False)
key_part = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="./\\"), min_size=1, max_size=12
).filter(lambda part: not part.startswith("__"))
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | numbers | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def latents_of_one_shard(draw: st.DrawFn) -> list[Latent]:
    dtype = draw(st.sampled_from(sorted(TORCH_DTYPES)))
    logvar = draw(st.sampled_from([False, True, "int8"]))
    keys = draw(
        st.lists(st.lists(key_part, min_size=1, max_size=2).map("/".join), max_size=5, unique=True), label="keys"
    )
    return stored_order([draw(_latent(f"{key}_00000", dtype, logvar)) for key in keys])


@st.composite
def _latent(draw: st.DrawFn, key: str, dtype: str, logvar: bool | str) -> Latent:
    latent = make_latent(
        key,
        dtype=dtype,
        logvar=logvar,
        size=draw(st.sampled_from(SIZES)),
        caption=draw(text),
        file_name=draw(text),
        fps=draw(st.none() | numbers),
        duration_sec=draw(numbers),
        frame_times=tuple(draw(st.lists(numbers, max_size=3))),
        frame_indices=tuple(draw(st.lists(st.integers(0, 2**40), max_size=3))),
        crop=tuple(draw(st.tuples(numbers, numbers, numbers, numbers))),
        padded_frames=draw(st.integers(0, 16)),
        metadata=draw(st.dictionaries(st.text(max_size=8), json_values, max_size=3)),
    )
    source = replace(latent.row.source, fps=draw(st.none() | numbers), duration=draw(st.none() | numbers))
    bits = torch.randint(0, 256, (latent.mean_CTHW.nbytes,), dtype=torch.uint8)  # NaN payloads and all
    mean = bits.view(latent.mean_CTHW.dtype).reshape(latent.mean_CTHW.shape)
    return replace(latent, row=replace(latent.row, source=source), mean_CTHW=mean)
