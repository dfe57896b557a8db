"""What every output format must do. A new one in FORMATS is tested here without a line."""

from __future__ import annotations

import io
import json
import os
import random
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from pipeline.documents import FORMAT_VERSION
from pipeline.errors import DatasetError
from pipeline.formats import FORMATS, ShardFormat, ShardHeader
from pipeline.records import Latent
from tests.pipeline.formats.made_latents import (
    HEADER,
    assert_same,
    index_rows,
    latents_of_one_shard,
    make_latent,
    make_latents,
    read_bytes,
    write_shard,
)

DTYPES = ("float16", "bfloat16", "float32")


@pytest.fixture(params=sorted(FORMATS))
def shard_format(request: pytest.FixtureRequest) -> ShardFormat:
    return FORMATS[request.param]


def test_registered_under_its_own_name(shard_format: ShardFormat) -> None:
    assert FORMATS[shard_format.name] is shard_format  # type: ignore[index]
    assert shard_format.suffix.startswith(".")


@pytest.mark.parametrize("logvar", [False, True, "int8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(shard_format: ShardFormat, tmp_path: Path, dtype: str, logvar: bool | str) -> None:
    latents = make_latents(8, dtype=dtype, logvar=logvar)
    path, places = write_shard(tmp_path, shard_format.name, latents)
    assert len(places) == len(latents)
    with path.open("rb") as file:
        assert_same(list(shard_format.read(file)), latents)
        assert shard_format.read_header(file) == HEADER
        assert not file.closed


@pytest.mark.parametrize("name", sorted(FORMATS))
@given(latents=latents_of_one_shard())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_comes_back(name: str, latents: list[Latent]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path, places = write_shard(Path(folder), name, latents)
        data = path.read_bytes()
    assert_same(read_bytes(name, data), latents)
    assert_same(list(FORMATS[name].fetch(io.BytesIO(data), index_rows(latents, places))), latents)  # type: ignore[index]


def test_fetch_in_any_order(shard_format: ShardFormat, tmp_path: Path) -> None:
    latents = make_latents(8, logvar=True)
    path, places = write_shard(tmp_path, shard_format.name, latents)
    rows = index_rows(latents, places)
    wanted = random.Random(0).sample(range(len(rows)), 5)
    with path.open("rb") as file:
        assert_same(
            list(shard_format.fetch(file, [rows[number] for number in wanted])),
            [latents[number] for number in wanted],
        )


def test_bytes_depend_on_content_alone(
    shard_format: ShardFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = make_latents(8, logvar=True)
    shuffled = [replace(x, row=replace(x.row, metadata=dict(reversed(x.row.metadata.items())))) for x in latents]
    (tmp_path / "other").mkdir()
    first, _ = write_shard(tmp_path, shard_format.name, latents)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86_400)
    monkeypatch.setenv("USER", "somebody")
    mask = os.umask(0o077)
    try:
        second, _ = write_shard(tmp_path / "other", shard_format.name, shuffled)
    finally:
        os.umask(mask)
    assert first.read_bytes() == second.read_bytes()


def test_what_was_read_writes_the_same_bytes(shard_format: ShardFormat, tmp_path: Path) -> None:
    path, _ = write_shard(tmp_path, shard_format.name, make_latents(8, dtype="bfloat16"))
    with path.open("rb") as file:
        header = shard_format.read_header(file)
        shard_format.write(tmp_path / "again", shard_format.read(file), header)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_a_shard_without_windows(shard_format: ShardFormat, tmp_path: Path) -> None:
    path, places = write_shard(tmp_path, shard_format.name, [])
    assert places == []
    with path.open("rb") as file:
        assert list(shard_format.read(file)) == []
        assert shard_format.read_header(file) == HEADER


def test_strided_tensors_are_stored_in_order(shard_format: ShardFormat, tmp_path: Path) -> None:
    latent = make_latent(size=(17, 16, 32))
    strided = latent.mean_CTHW.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not strided.is_contiguous()
    path, _ = write_shard(tmp_path, shard_format.name, [replace(latent, mean_CTHW=strided)])
    assert_same(read_bytes(shard_format.name, path.read_bytes()), [latent])


@pytest.mark.parametrize(
    ("latents", "message"),
    [
        pytest.param(make_latents(4)[::-1], r"strictly increasing \(bucket, key\)", id="order"),
        pytest.param([make_latent(), make_latent()], "strictly increasing", id="repeat"),
        pytest.param(
            [make_latent(), make_latent("d_00000", dtype="float32")], "one shard stores one kind", id="dtypes"
        ),
        pytest.param([make_latent(), make_latent("d_00000", logvar=True)], "one shard stores one kind", id="logvars"),
        pytest.param([make_latent(shard_id="00013")], "header says '00012'", id="shard"),
        pytest.param([make_latent("a.b_00000")], "dot in its last part", id="dot"),
        pytest.param([make_latent("../b_00000")], r"'\.\.' part", id="parent"),
        pytest.param([make_latent("a\nb_00000")], "control character", id="newline"),
        pytest.param([make_latent("__x__/b_00000")], "webdataset library skips", id="skipped"),
        pytest.param([make_latent(caption="\ud800", pair_sha256="")], "caption", id="surrogate"),
        pytest.param([make_latent(fps=float("nan"))], "fps", id="nan"),
        pytest.param([make_latent(metadata={"a": float("inf")})], "not JSON compliant", id="infinity"),
        pytest.param([make_latent(latent_shape=(4, 5, 2, 3))], r"expected float16 \[4, 5, 2, 3\], got", id="shape"),
        pytest.param([make_latent(latent_dtype="float32")], "expected float32", id="dtype"),
        pytest.param([make_latent(has_logvar=True)], "logvar is missing", id="logvar"),
    ],
)
def test_what_may_not_be_stored(
    shard_format: ShardFormat, tmp_path: Path, latents: list[Latent], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_shard(tmp_path, shard_format.name, latents)


def test_memory_does_not_grow_with_the_shard(shard_format: ShardFormat, tmp_path: Path) -> None:
    """200 latents of 1 MiB are written and read with room for a small part of them at a time."""

    def latents() -> Iterator[Latent]:
        for number in range(200):
            yield replace(make_latent(f"c{number:03d}_00000", latent_shape=(4, 16, 64, 128)), mean_CTHW=blank)

    blank = torch.zeros(4, 16, 64, 128, dtype=torch.float16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.formats.parquet_format.ROW_GROUP_BYTES", 8 << 20)
        tracemalloc.start()
        try:
            shard_format.write(tmp_path / "shard", latents(), HEADER)
            with (tmp_path / "shard").open("rb") as file:
                assert sum(1 for _ in shard_format.read(file)) == 200
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 64 << 20


def test_a_newer_version_is_refused(shard_format: ShardFormat, tmp_path: Path) -> None:
    newer = HEADER.model_copy(update={"format_version": FORMAT_VERSION + 1})
    path = tmp_path / "newer"
    shard_format.write(path, make_latents(), newer)
    for read in (shard_format.read_header, lambda file: list(shard_format.read(file))):
        with path.open("rb") as file, pytest.raises(DatasetError, match=r"newer: .*expected .*at most 1, got 2"):
            read(file)


def test_every_cut_is_noticed(shard_format: ShardFormat, tmp_path: Path) -> None:
    """Whatever is left of a shard that lost its end: an error, never fewer latents. Padding is not its content."""
    latents = make_latents(4, logvar=True)
    path, _ = write_shard(tmp_path, shard_format.name, latents)
    data = path.read_bytes()
    content = len(data.rstrip(b"\0")) if shard_format.name == "webdataset" else len(data)
    cuts = {0, 1, content - 1, *range(512, content, 512), *random.Random(0).sample(range(content), 50)}
    for cut in sorted(cuts):
        with pytest.raises(DatasetError):
            read_bytes(shard_format.name, data[:cut])


def test_random_damage_is_an_error_or_harmless(shard_format: ShardFormat, tmp_path: Path) -> None:
    """Flipped bytes never end in another exception. (That numbers are whole is the receipt's sha256 to say.)"""
    path, _ = write_shard(tmp_path, shard_format.name, make_latents(4, logvar=True))
    data = path.read_bytes()
    rng = random.Random(1)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        start = rng.randrange(len(data))
        damaged[start : start + rng.choice((1, 1, 8))] = rng.randbytes(1)
        try:
            read_bytes(shard_format.name, bytes(damaged))
        except DatasetError:
            refused += 1
    assert refused > 30


def test_header_is_strict() -> None:
    raw = json.loads(HEADER.to_json())
    for change, message in (
        ({"latent_state": "normalized"}, "latent_state"),
        ({"pixel_range": [0, 1]}, "pixel_range"),
        ({"fingerprint": "xyz"}, "fingerprint"),
        ({"surprise": 1}, "surprise"),
    ):
        with pytest.raises(DatasetError, match=f"here.*(.|\n)*{message}"):
            ShardHeader.from_bytes(json.dumps(raw | change).encode(), "here")
    assert ShardHeader.from_bytes(HEADER.to_json().encode(), "here") == HEADER
