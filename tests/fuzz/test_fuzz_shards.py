"""Mutated tars and sidecars from first byte to verified dataset, and samples whose texts hold anything at all."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from pipeline.dataset import DatasetFolder
from pipeline.decode.pool import DecodePool
from pipeline.records import LatentRow
from pipeline.run import RunPlan, plan_run
from pipeline.scratch import Scratch
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.sources.metadata import plain_json
from pipeline.storage import Store
from tests.fuzz.local_run import assert_verified, run_local, settings_for, shard_encoder, stored_latents
from tests.fuzz.mutations import mutate, seeds, tell
from tests.fuzz.peak_memory import PeakMemory

Member = tuple[str, bytes]
WHOLE = "whole"
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def tar_bytes(members: Iterable[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def samples(small_clips: dict[str, bytes]) -> list[Member]:
    """Five samples in video2dataset's order, the last a failed download."""
    members: list[Member] = []
    for number, name in enumerate(("plain.mp4", "plain.mkv", "mpeg4.avi", "vp9.webm")):
        key, extension = f"{number:09d}", name.rpartition(".")[2]
        caption = f"number {number} in {name}"
        members.append((f"{key}.json", json.dumps({"key": key, "caption": caption, "status": "success"}).encode()))
        members.append((f"{key}.{extension}", small_clips[name]))
        members.append((f"{key}.txt", caption.encode()))
    return [*members, ("000000004.json", b'{"status": "failed_to_download", "error_message": "HTTP Error 404"}')]


def sidecar_bytes(keys: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"key": keys, "status": ["success"] * len(keys), "n": range(len(keys))}), buffer)
    return buffer.getvalue()


def write_mutated(folder: Path, small_clips: dict[str, bytes], numbers: list[int]) -> None:
    """A tar per seed, beside each a sidecar, mutated too for every other seed, or none for every fifth."""
    tar, sidecar = tar_bytes(samples(small_clips)), sidecar_bytes([f"{n:09d}" for n in range(5)])
    (folder / f"{WHOLE}.tar").write_bytes(tar)
    (folder / f"{WHOLE}.parquet").write_bytes(sidecar)
    others = [tar, sidecar, *small_clips.values()]
    for seed in numbers:
        draw = random.Random(f"tar {seed}")
        (folder / f"{seed:08d}.tar").write_bytes(mutate(tar, others, draw))
        if seed % 5:
            (folder / f"{seed:08d}.parquet").write_bytes(mutate(sidecar, others, draw) if seed % 2 else sidecar)


def identity_of(row: LatentRow) -> tuple[str, str, tuple[int, ...]]:
    """Windows that agree in this were cut from the same clip at the same place."""
    return row.key, row.pair_sha256, row.frame_indices


def sweep(
    tmp_path: Path, small_clips: dict[str, bytes], numbers: list[int], pool: DecodePool, scratch: Scratch
) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_mutated(source, small_clips, numbers)
    job = settings_for({"kind": "webdataset", "urls": str(source)}, output)
    with PeakMemory() as peak:
        manifest = run_local(job, pool, scratch)
    counts = manifest.counts
    tell(numbers, "tars", f"{counts.samples} samples, {counts.clips_encoded} encoded, {manifest.rejections}")
    assert len(manifest.shards) == len(numbers) + 1, "no tar is lost and none stops the run"
    assert_verified(job)
    whole = DatasetFolder(Store(str(output))).receipt(WHOLE)
    assert (whole.counts.samples, whole.counts.clips_encoded) == (5, 4)
    latents = stored_latents(output)
    good = {identity_of(latent.row): latent for (shard, _), latent in latents.items() if shard == WHOLE}
    assert len(good) == whole.counts.windows_stored == 8
    again = 0
    for (shard, key), latent in latents.items():
        expected = good.get(identity_of(latent.row))
        if expected is not None:
            again += 1
            assert torch.equal(latent.mean_CTHW, expected.mean_CTHW), f"seed {shard}: {key} has other numbers"
    assert again > len(numbers) or len(numbers) < 20, "most clips beside a mutated one are whole"
    assert peak.own_growth < 512 << 20


def test_mutated_tars_and_sidecars(
    tmp_path: Path, small_clips: dict[str, bytes], pool: DecodePool, scratch: Scratch
) -> None:
    sweep(tmp_path, small_clips, seeds(0, 25), pool, scratch)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("start", range(1_000_000, 1_004_000, 1_000))
def test_many_mutated_tars_and_sidecars(
    tmp_path: Path, small_clips: dict[str, bytes], pool: DecodePool, scratch: Scratch, start: int
) -> None:
    """4,000 in all, about fifteen minutes on two idle cores."""
    sweep(tmp_path, small_clips, seeds(start, 1_000), pool, scratch)


# Samples whose tar is whole and whose texts are anything

numbers = st.integers() | st.floats() | st.just(10**4000)
leaves = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(["\ud800", "\0", "é" * 300])
trees = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
nests = st.integers(0, 1200).map(lambda depth: '{"a":' * depth + "1" + "}" * depth)
jsons = (
    trees.map(lambda tree: json.dumps(tree).encode())
    | st.dictionaries(st.sampled_from(["caption", "status", "key", "name", "x"]), trees).map(
        lambda tree: json.dumps(tree, ensure_ascii=False).encode("utf-8", "surrogatepass")
    )
    | nests.map(str.encode)
    | st.binary(max_size=20)
)
keys = st.text(alphabet=st.sampled_from("ab./\\_ é\0\n\u2028\U0001f600-"), min_size=1, max_size=9) | st.text(
    st.characters(codec="utf-8"), min_size=1, max_size=9
)
captions = st.none() | st.binary(max_size=12) | st.text(max_size=40).map(lambda t: t.encode("utf-8", "surrogatepass"))
texts = st.tuples(keys, st.none() | jsons, captions)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, small_clips: dict[str, bytes]) -> RunPlan:
    """A plan whose job the examples share, with sources and outputs of their own: building a VAE takes a while."""
    folder = tmp_path_factory.mktemp("planned")
    (folder / "00000.tar").write_bytes(tar_bytes([("k.mp4", small_clips["plain.mp4"])]))
    windows = {"frames": 9, "max_windows": 1}
    return plan_run(settings_for({"kind": "webdataset", "urls": str(folder)}, folder / "out", windows=windows), {})


@FUZZ
@given(rows=st.lists(texts, min_size=1, max_size=8))
def test_texts_of_any_kind(
    rows: list[tuple[str, bytes | None, bytes | None]],
    tmp_path_factory: pytest.TempPathFactory,
    small_clips: dict[str, bytes],
    planned: RunPlan,
    pool: DecodePool,
    scratch: Scratch,
) -> None:
    """What a sample says of itself is stored as it was, or the sample is refused; the one after it is untouched."""
    folder = tmp_path_factory.mktemp("texts")
    members: list[Member] = []
    said: dict[str, list[tuple[bytes | None, bytes | None]]] = {}
    for key, raw, caption in [*rows, ("zz/last", None, b"the last one")]:
        parts = {"json": raw, "mp4": small_clips["plain.mp4"], "txt": caption}
        members += [(f"{key}.{extension}", part) for extension, part in parts.items() if part is not None]
        said.setdefault(key.removeprefix("./"), []).append((raw, caption))
    (folder / "00000.tar").write_bytes(tar_bytes(members))
    source = WebDatasetSource(urls=str(folder))
    job = replace(planned.job(), source=source, store=Store(str(folder / "out")))
    (shard,) = plan_source(source).shards
    receipt = shard_encoder(job, planned.settings.encode, pool, scratch).run(shard).receipt
    event(f"{receipt.counts.clips_rejected} rejected")
    assert not any(rejection.scope == "shard" for rejection in receipt.rejections), "the tar is whole"
    rows_stored = [latent.row for latent in stored_latents(folder / "out").values()]
    assert len(rows_stored) == receipt.counts.clips_encoded
    assert "zz/last" in {row.clip_key for row in rows_stored}
    for row in rows_stored:
        assert any(
            row.metadata == ({} if raw is None else plain_json(raw))
            and (caption is None or row.caption.encode() == caption)
            for raw, caption in said.get(row.clip_key, [])
            if raw is None or is_plain(raw)
        ), f"{row.clip_key!r} is stored with {row.metadata!r} and {row.caption!r}"


def is_plain(raw: bytes) -> bool:
    try:
        return isinstance(plain_json(raw), dict)
    except (ValueError, RecursionError):
        return False
