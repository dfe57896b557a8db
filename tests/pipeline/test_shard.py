"""One shard from first byte to upload, without Ray."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from cvvae import SPECS, VideoVAE, seeded_vae
from pipeline.decode.pool import ClipDone, ClipRetracted, DecodeEvent, DecodePool, WindowReady
from pipeline.documents import RunIdentity, ShardReceipt
from pipeline.encoder import TileEncoder
from pipeline.errors import ClipError, RejectionClass, ShardError
from pipeline.formats import FORMATS, read_index
from pipeline.policies import DecodePolicy, EncodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Rejection
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob
from pipeline.sources import WebDatasetSource, plan_source
from pipeline.storage import Store

WINDOWS = WindowPolicy(frames=17, max_windows=2, tail="drop")
DEFAULT_ENCODE = EncodePolicy()
RESIZE = ResizePolicy(buckets=((32, 32), (32, 64)))


@pytest.fixture(scope="module")
def tars(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return v2d_shards(tmp_path_factory.mktemp("source"), num_shards=1, good=3)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecodePool]:
    with DecodePool(DecodePolicy(), 2) as pool:
        yield pool


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Scratch]:
    scratch = Scratch(tmp_path / "scratch")
    yield scratch
    scratch.close()


def job_for(vae: VideoVAE, tars: list[Path], output: Path) -> ShardJob:
    assert vae.weights_sha256 is not None
    identity = RunIdentity(
        weights_sha256=vae.weights_sha256,
        vae=vae.spec.to_dict(),
        windows=WINDOWS,
        resize=RESIZE,
        decode_backends=("pyav", "decord"),
        compute_dtype="float32",
        storage_dtype="float16",
        logvar=True,
    )
    return ShardJob(
        source=WebDatasetSource(urls=str(tars[0])),
        windows=WINDOWS,
        resize=RESIZE,
        decode=DecodePolicy(),
        identity=identity,
        format="webdataset",
        store=Store(str(output)),
    )


def run(
    job: ShardJob, vae: VideoVAE, pool: DecodePool, scratch: Scratch, encode: EncodePolicy = DEFAULT_ENCODE
) -> ShardReceipt:
    encoder = TileEncoder(vae, encode, torch.device("cpu"))
    (shard,) = plan_source(job.source).shards
    return ShardEncoder(job, encoder, pool, scratch).run(shard).receipt


def tiny() -> VideoVAE:
    return seeded_vae(SPECS["cvvae-sd21-tiny"], 1)


def test_receipt_describes_the_stored_objects(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    job = job_for(tiny(), tars, tmp_path / "out")
    receipt = run(job, tiny(), pool, scratch)
    payload = tmp_path / "out" / receipt.payload.path
    assert payload.stat().st_size == receipt.payload.size
    rows = read_index(tmp_path / "out" / receipt.index.path).rows
    with payload.open("rb") as file:
        latents = list(FORMATS["webdataset"].read(file))
    assert [row.row for row in rows] == [latent.row for latent in latents]
    assert receipt.counts.windows_stored == len(rows) == sum(receipt.buckets.values())
    assert {r.error_class for r in receipt.rejections} >= {"upstream_failed"}
    assert list(scratch.path.iterdir()) == [], "scratch space is given back"


def test_a_stored_latent_is_the_encoding_of_its_frames(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    """Decode and encode one window by hand, through the other door."""
    from pipeline.decode.clips import decode_clip
    from pipeline.sources import SourceDigest, read_shard

    vae = tiny()
    job = job_for(vae, tars, tmp_path / "out")
    receipt = run(job, vae, pool, scratch)
    with (tmp_path / "out" / receipt.payload.path).open("rb") as file:
        stored = {latent.row.key: latent for latent in FORMATS["webdataset"].read(file)}
    (shard,) = plan_source(job.source).shards
    sample = next(read_shard(shard, job.source, max_clip_bytes=1 << 30, digest=SourceDigest()))
    window = next(decode_clip(sample.video.path, "pyav", WINDOWS, RESIZE, lengths=(17,))).to_window(sample.key)
    video = torch.from_numpy(window.frames_THWC.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(video)
    latent = stored[window.key]
    torch.testing.assert_close(latent.mean_CTHW.float(), expected.mean[0], rtol=2e-3, atol=2e-3)
    assert latent.logvar_CTHW is not None
    torch.testing.assert_close(latent.logvar_CTHW.float(), expected.logvar[0], rtol=2e-3, atol=2e-2)


def test_overflow_in_the_storage_dtype_is_a_rejection_not_a_number(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    vae = tiny()
    with torch.no_grad():
        vae.state_dict()["encoder.conv_out.weight"].mul_(1e6)
    receipt = run(job_for(vae, tars, tmp_path / "out"), vae, pool, scratch)
    assert receipt.counts.windows_stored == 0
    assert receipt.counts.windows_rejected == receipt.counts.windows_decoded > 0
    windows = [r for r in receipt.rejections if r.scope == "window"]
    assert {r.error_class for r in windows} == {"non_finite"}
    assert len(windows) == receipt.counts.windows_rejected


def test_a_whole_object_of_another_attempt_is_adopted(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    """The first object wins even if other numerics wrote it; the receipt then names those numerics."""
    vae = tiny()
    job = job_for(vae, tars, tmp_path / "out")
    first = run(job, vae, pool, scratch, EncodePolicy(batch_pixels=1))
    before = (tmp_path / "out" / first.payload.path).read_bytes()
    second = run(job, tiny(), pool, scratch, EncodePolicy(batch_pixels=2 * 17 * 32 * 64))
    assert (tmp_path / "out" / first.payload.path).read_bytes() == before
    assert second == first
    assert second.numerics["batch_pixels"] == 1


def test_an_object_that_is_something_else_is_refused(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    vae = tiny()
    job = job_for(vae, tars, tmp_path / "out")
    other = replace(job, identity=job.identity.model_copy(update={"weights_sha256": "0" * 64}))
    run(other, vae, pool, scratch)
    with pytest.raises(ShardError, match=r"shard 00000: .*another attempt and holds something else"):
        run(job, vae, pool, scratch)


def test_equal_runs_store_equal_bytes(tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch) -> None:
    receipts = [run(job_for(tiny(), tars, tmp_path / name), tiny(), pool, scratch) for name in "ab"]
    assert receipts[0].to_bytes() == receipts[1].to_bytes()
    for stored in (receipts[0].payload, receipts[0].index):
        assert (tmp_path / "a" / stored.path).read_bytes() == (tmp_path / "b" / stored.path).read_bytes()


class KillingPool:
    """A real pool whose children are killed when the n-th windows come, as the kernel's OOM killer would."""

    def __init__(self, pool: DecodePool, at: set[int]) -> None:
        self._pool = pool
        self._at = at
        self._windows = 0

    def decode(self, *arguments: Any) -> Generator[DecodeEvent, None, None]:
        for event in self._pool.decode(*arguments):
            yield event
            if isinstance(event, WindowReady):
                self._windows += 1
                if self._windows in self._at:
                    for pid in self._pool.child_pids():
                        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("at", [{1}, {2, 4}, {1, 2, 3, 4, 5}])
def test_killed_decode_children_do_not_change_a_byte(
    at: set[int], tars: list[Path], tmp_path: Path, scratch: Scratch
) -> None:
    """Batches of three tiles, so that a window too many would shift all that follow."""
    encode = EncodePolicy(batch_pixels=3 * 17 * 32 * 64)
    with DecodePool(DecodePolicy(), 1) as pool:
        calm = run(job_for(tiny(), tars, tmp_path / "calm"), tiny(), pool, scratch, encode)
        killed = run(
            job_for(tiny(), tars, tmp_path / "killed"),
            tiny(),
            cast(DecodePool, KillingPool(pool, at)),
            scratch,
            encode,
        )
    if killed.rejections == calm.rejections:
        assert killed.to_bytes() == calm.to_bytes()
    else:  # two kills at one clip: it is rejected, and the shard is what it is without that clip
        lost = {r.key for r in killed.rejections} - {r.key for r in calm.rejections}
        assert {r.error_class for r in killed.rejections if r.key in lost} == {"decoder_crashed"}
        killed.counts.check("killed")
        assert killed.counts.clips_encoded == calm.counts.clips_encoded - len(lost)


def test_a_lost_clip_leaves_the_shard_as_if_it_had_given_nothing(
    tars: list[Path], tmp_path: Path, scratch: Scratch
) -> None:
    """Its decode child is killed at its second window in both attempts; another run loses it before its first."""
    encode = EncodePolicy(batch_pixels=3 * 17 * 32 * 64)
    receipts = []
    for name, memory in (("late", 4096), ("early", 4096)):
        with DecodePool(DecodePolicy(memory_mb=memory, windows_in_flight=1), 1) as pool:
            losing = cast(DecodePool, LosingPool(pool, after=1 if name == "late" else 0))
            receipts.append(run(job_for(tiny(), tars, tmp_path / name), tiny(), losing, scratch, encode))
    assert receipts[0].to_bytes() == receipts[1].to_bytes()
    assert [r.error_class for r in receipts[0].rejections if r.key == "000000000"] == ["decoder_crashed"]


class LosingPool:
    """A real pool in which the first clip is lost after it gave `after` windows."""

    def __init__(self, pool: DecodePool, after: int) -> None:
        self._pool = pool
        self._after = after

    def decode(self, *arguments: Any) -> Generator[DecodeEvent, None, None]:
        given = 0
        for event in self._pool.decode(*arguments):
            if event.clip.key != "000000000":
                yield event
            elif isinstance(event, WindowReady) and given < self._after:
                given += 1
                yield event
            elif isinstance(event, ClipDone):
                if given:
                    yield ClipRetracted(event.clip)
                error = ClipError(RejectionClass.DECODER_CRASHED, "decode", "the decode child died (2 attempts)")
                rejection = Rejection.from_error(error, key=event.clip.key, shard_id=event.clip.shard_id)
                yield ClipDone(event.clip, rejection=rejection)


def test_an_object_made_from_another_source_is_not_adopted(
    tars: list[Path], v2d_shards: Callable[..., list[Path]], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    """Same keys and identity, other captions: stored before a kill, then the tar was replaced."""
    vae = tiny()
    job = job_for(vae, tars, tmp_path / "out")
    run(job, vae, pool, scratch)
    other = tmp_path / "source" / tars[0].name
    other.parent.mkdir()
    other.write_bytes(tars[0].read_bytes().replace(b"The white roof", b"The black roof"))
    with pytest.raises(ShardError, match=r"not the \d+ of this source; delete it"):
        run(replace(job, source=WebDatasetSource(urls=str(other))), vae, pool, scratch)


def test_a_damaged_object_says_what_to_do(
    tars: list[Path], tmp_path: Path, pool: DecodePool, scratch: Scratch
) -> None:
    vae = tiny()
    job = job_for(vae, tars, tmp_path / "out")
    job.store.create("shards/00000.tar", b"half a shard")
    with pytest.raises(ShardError, match=r"is damaged .*delete it to encode the shard again"):
        run(job, vae, pool, scratch)
