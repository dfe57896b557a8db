"""Whole runs while the store misbehaves: they end with the bytes of an undisturbed run, or with a clear error and
with those bytes when started again. The server is real; a proxy in front of it makes faults, drawn from a seed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvvae import save_vae
from pipeline import s3_client
from pipeline.checkpoints import VAESource, load_source
from pipeline.errors import PipelineError, StorageError
from pipeline.run import EncodeSettings
from pipeline.storage import Store, open_stream
from tests.s3_server import LOST_REPLY, Fault, FaultPlan, S3Server, proxy_to, running_s3
from tests.whole_run import Run, dataset_bytes, one_encoder, settings_for, upload

SHARDS = 2
FAST_SEEDS = range(1)
SWEPT_SEEDS = [int(seed) for seed in os.environ.get("FAULT_SEEDS", "").split()] or list(range(100, 132))
"""FAULT_SEEDS="104 117" runs those alone."""
STALL = 6.0
IMPATIENT = {"config_kwargs": {"read_timeout": 3}}
"""So that a stalled reply costs a test three seconds."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with one_encoder(tmp_path_factory.mktemp("scratch")) as run:
        yield run


@pytest.fixture(scope="module")
def inputs(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tars with sidecars in source/, a checkpoint in vae/."""
    folder = tmp_path_factory.mktemp("inputs")
    v2d_shards(folder / "source", num_shards=SHARDS, good=1, failed=1, broken=0)
    save_vae(load_source(VAESource(spec="cvvae-sd21-tiny", options={})), folder / "vae")
    return folder


def bring(inputs: Path, server: S3Server) -> Store:
    bucket = Store(f"{server.url}/faults", options=server.options)
    for name in ("source", "vae"):
        upload(inputs / name, bucket, name)
    return bucket


@pytest.fixture(scope="module")
def bucket(inputs: Path, s3_server: S3Server) -> Store:
    return bring(inputs, s3_server)


def settings(bucket: Store, name: str, options: dict[str, Any]) -> EncodeSettings:
    vae = VAESource(checkpoint=f"{bucket.url}/vae", options=options)
    return settings_for(f"{bucket.url}/source", f"{bucket.url}/{name}", options, vae=vae)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test fetches the checkpoint itself."""
    monkeypatch.setenv("LATENTS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def undisturbed(bucket: Store, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LATENTS_CACHE", str(tmp_path_factory.mktemp("cache")))
        run(settings(bucket, "undisturbed", bucket.options))
    return stored(bucket, "undisturbed")


def stored(bucket: Store, name: str) -> dict[str, bytes]:
    content = dataset_bytes(Store(f"{bucket.url}/{name}", options=bucket.options))
    assert len(content) == 2 + 3 * SHARDS
    return content


def run_with_faults(seed: int, bucket: Store, server: S3Server, run: Run) -> FaultPlan:
    plan = FaultPlan(seed, stall_seconds=STALL)
    with proxy_to(server, plan) as proxy:
        run(settings(bucket, f"seed-{seed}", proxy.options | IMPATIENT))
    return plan


@pytest.mark.parametrize("seed", FAST_SEEDS)
def test_faults_everywhere_and_equal_bytes(
    seed: int, bucket: Store, s3_server: S3Server, run: Run, undisturbed: dict[str, bytes]
) -> None:
    plan = run_with_faults(seed, bucket, s3_server, run)
    assert len(plan.drawn) >= 5, "a plan without faults tests nothing"
    assert stored(bucket, f"seed-{seed}") == undisturbed, plan.drawn


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_sweep_of_fault_plans(
    bucket: Store,
    s3_server: S3Server,
    run: Run,
    undisturbed: dict[str, bytes],
    cache: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kinds: Counter[str] = Counter()
    for seed in SWEPT_SEEDS:
        shutil.rmtree(cache, ignore_errors=True)
        plan = run_with_faults(seed, bucket, s3_server, run)
        kinds.update(f"{method} {fault}" for method, _, fault in (line.split(" ", 2) for line in plan.drawn))
        assert stored(bucket, f"seed-{seed}") == undisturbed, (seed, plan.drawn)
    with capsys.disabled():
        sys.stdout.write(
            f"\n{len(SWEPT_SEEDS)} fault plans, all equal: seeds {SWEPT_SEEDS[0]} to {SWEPT_SEEDS[-1]}\n"
        )
        sys.stdout.write(f"{kinds.total()} faults: {dict(sorted(kinds.items()))}\n")


def test_lost_replies_to_puts_that_happened(
    bucket: Store, s3_server: S3Server, run: Run, undisturbed: dict[str, bytes]
) -> None:
    """The client asks again and is told that the object is there: it is looked at and found to be ours."""
    names = ["run.json", "shards/00001.tar", "index/00000.parquet", "receipts/00001.json"]
    left = list(names)

    def plan(method: str, target: str) -> Fault:
        for name in left:
            if method == "PUT" and target.endswith(name):
                left.remove(name)
                return LOST_REPLY
        return Fault()

    with proxy_to(s3_server, plan) as proxy:
        run(settings(bucket, "lost", proxy.options | IMPATIENT))
        for name in names:
            assert len(proxy.requests("PUT", name)) >= 2
            assert proxy.requests("GET", name), "what is there was read"
    assert stored(bucket, "lost") == undisturbed


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("GET .*source/00001.tar", marks=pytest.mark.slow),
        "PUT .*shards/00000.tar",
        pytest.param("PUT .*receipts/00000.json", marks=pytest.mark.slow),
    ],
)
def test_the_server_is_killed_and_comes_back(
    moment: str, inputs: Path, run: Run, undisturbed: dict[str, bytes]
) -> None:
    """SIGKILL while a request is under way; a new process on the same ports and folder two seconds later."""
    with running_s3() as server:
        bucket = bring(inputs, server)
        met = threading.Event()

        def plan(method: str, target: str) -> Fault:
            if re.search(moment, f"{method} {target}") and not met.is_set():
                server.kill()
                met.set()
            return Fault()

        def bring_back() -> None:
            if met.wait(120):
                time.sleep(2)
                server.start()

        thread = threading.Thread(target=bring_back)
        thread.start()
        with proxy_to(server, plan) as proxy:
            disturbed = settings(bucket, "disturbed", proxy.options | IMPATIENT)
            try:
                run(disturbed)
            except PipelineError:  # it may outlast the client's patience; then a new run goes on
                thread.join()
                run(disturbed)
            thread.join()
        assert met.is_set()
        assert stored(bucket, "disturbed") == undisturbed, "of another server with the same names"


SILENCES = {
    "no reply": Fault(stall_seconds=120),
    "no leave to send": Fault(stall_seconds=120, unread=True, continues=False),
    "a body that nobody reads": Fault(stall_seconds=120, unread=True),
}


@pytest.mark.parametrize(
    "silence", ["no reply", *(pytest.param(name, marks=pytest.mark.slow) for name in list(SILENCES)[1:])]
)
def test_a_silent_server_is_an_error_not_a_hang(
    silence: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_client, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(s3_client, "SLOWEST_BYTES_PER_SECOND", 64 << 20)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 2)
    with proxy_to(s3_server, lambda _method, _target: SILENCES[silence]) as proxy:
        options = proxy.options | {"config_kwargs": {"read_timeout": 1, "retries": {"total_max_attempts": 2}}}
        store = Store(f"{s3_server.url}/silent", options=options)
        with pytest.raises(StorageError, match=r"s3://bucket/silent/a: ReadTimeoutError"):
            store.create("a", bytes(32 << 20))
        with open_stream(f"{store.url}/a", options) as stream, pytest.raises(StorageError, match="ReadTimeoutError"):
            stream.read(1)
        for method in ("PUT", "GET"):
            assert len(proxy.requests(method, "/a")) <= 2 * 2, "tried as often as it should be, and no more"


UPLOAD = """
import sys
from pathlib import Path
from pipeline.storage import Store
Store(sys.argv[1], options={"endpoint_url": sys.argv[2]}).create("large", Path(sys.argv[3]))
"""


def test_a_killed_multipart_upload_leaves_nothing_to_see(s3_server: S3Server, tmp_path: Path) -> None:
    """From 100 MiB on the client uploads in parts. Their store keeps the parts of a killed writer out of sight, for a
    lifecycle rule to remove (docs/storage.md); the next writer is not disturbed by them."""
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(101 << 20)
    store = Store(f"{s3_server.url}/multipart", options=s3_server.options)

    def plan(_method: str, target: str) -> Fault:
        return Fault(stall_seconds=60) if "partNumber=3" in target else Fault()

    with proxy_to(s3_server, plan) as proxy:
        command = [sys.executable, "-c", UPLOAD, store.url, proxy.options["endpoint_url"], str(large)]
        writer = subprocess.Popen(command, cwd=Path(__file__).parents[2])
        deadline = time.monotonic() + 120
        while not any("partNumber=3" in head for head in proxy.heads):
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
    client = s3_server.client()
    assert store.info("large") is None
    assert list(store.names("", "")) == []
    uploads = client.list_multipart_uploads(Bucket="bucket")["Uploads"]
    assert [upload["Key"] for upload in uploads] == ["multipart/large"]
    assert store.create("large", large)
    assert not store.create("large", large), "the condition holds for uploads in parts"
    info = store.info("large")
    assert info is not None
    assert info.size == 101 << 20
    left = client.list_multipart_uploads(Bucket="bucket")["Uploads"]
    assert [upload["UploadId"] for upload in left] == [upload["UploadId"] for upload in uploads], "ours is aborted"
    client.abort_multipart_upload(Bucket="bucket", Key="multipart/large", UploadId=uploads[0]["UploadId"])
    client.delete_object(Bucket="bucket", Key="multipart/large")
