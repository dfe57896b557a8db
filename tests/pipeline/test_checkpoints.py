"""Checkpoints come to local disk once, whole or not at all; what cannot come is a clear ConfigError."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from pydantic import ValidationError

from cvvae import save_vae
from pipeline.checkpoints import VAESource, cache_folder, fetch_checkpoint, load_source
from pipeline.errors import ConfigError
from tests.s3_server import S3Server

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def memory(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a remote folder with a checkpoint in it."""
    url = f"memory://{request.function.__name__}"
    fs = fsspec.filesystem("memory")
    for name, content in {WEIGHTS: b"weights", "config.json": b"{}", "optimizer.bin": b"not asked for"}.items():
        fs.pipe_file(f"{url}/{name}", content)
    yield url
    fs.rm(url, recursive=True)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are fetched, slowly enough for callers to meet."""
    fetched: list[str] = []
    get_file = MemoryFileSystem.get_file

    def slow_get_file(self: Any, remote: str, local: str, **options: Any) -> None:
        fetched.append(remote.rsplit("/", 1)[-1])
        time.sleep(0.02)
        get_file(self, remote, local, **options)

    monkeypatch.setattr(MemoryFileSystem, "get_file", slow_get_file)
    return fetched


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_local_path_is_used_where_it_is(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "a.ckpt"):
        if path.suffix:
            path.touch()
        assert fetch_checkpoint(str(path), cache=tmp_path / "cache") == path
    assert not (tmp_path / "cache").exists()


def test_a_remote_folder_is_fetched_once(memory: str, downloads: list[str], tmp_path: Path) -> None:
    path = fetch_checkpoint(memory, cache=tmp_path)
    assert contents(path) == {WEIGHTS: b"weights", "config.json": b"{}"}
    assert fetch_checkpoint(memory, cache=tmp_path) == path
    assert sorted(downloads) == ["config.json", WEIGHTS]


def test_a_remote_file_is_fetched_once(memory: str, downloads: list[str], tmp_path: Path) -> None:
    url = f"{memory}/{WEIGHTS}"
    path = fetch_checkpoint(url, cache=tmp_path)
    assert (path.name, path.read_bytes()) == (WEIGHTS, b"weights")
    assert fetch_checkpoint(url, cache=tmp_path) == path
    assert downloads == [WEIGHTS]


@pytest.mark.parametrize("changed", [b"other weights", b"WEIGHTS"], ids=["another size", "the same size"])
@pytest.mark.parametrize("remote", ["memory", "file", "s3"])
def test_a_changed_checkpoint_is_fetched_anew(
    memory: str, tmp_path: Path, changed: bytes, remote: str, request: pytest.FixtureRequest
) -> None:
    options: dict[str, Any] = {}
    url = memory
    if remote == "file":
        url = f"file://{tmp_path}/remote"
    if remote == "s3":
        server: S3Server = request.getfixturevalue("s3_server")
        url, options = f"{server.url}/checkpoint-{len(changed)}", server.options
    fs, root = fsspec.url_to_fs(url, **options)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/{WEIGHTS}", b"weights")
    cache = tmp_path / "cache"
    before = fetch_checkpoint(url, options, cache=cache)
    assert fetch_checkpoint(url, options, cache=cache) == before
    time.sleep(0.01)
    fs.pipe_file(f"{root}/{WEIGHTS}", changed)
    after = fetch_checkpoint(url, options, cache=cache)
    assert (before / WEIGHTS).read_bytes() == b"weights"
    assert (after / WEIGHTS).read_bytes() == changed


def test_callers_that_meet_download_once(memory: str, downloads: list[str], tmp_path: Path) -> None:
    start = threading.Barrier(6)

    def fetch(_: int) -> Path:
        start.wait()
        return fetch_checkpoint(memory, cache=tmp_path)

    with ThreadPoolExecutor(6) as pool:
        assert len(set(pool.map(fetch, range(6)))) == 1
    assert sorted(downloads) == ["config.json", WEIGHTS]


def test_a_broken_download_leaves_nothing_that_looks_whole(
    memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get_file = MemoryFileSystem.get_file

    def broken(self: Any, remote: str, local: str, **options: Any) -> None:
        Path(local).write_bytes(b"half")
        raise ConnectionResetError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", broken)
        with pytest.raises(ConfigError, match="gone"):
            fetch_checkpoint(memory, cache=tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    # a killed process cannot tidy up; the next one does
    killed = tmp_path / f"{next(tmp_path.iterdir()).name.removesuffix('.lock')}.0123.part"
    killed.mkdir()
    assert contents(fetch_checkpoint(memory, cache=tmp_path))[WEIGHTS] == b"weights"
    assert MemoryFileSystem.get_file is get_file
    assert not killed.exists()


@pytest.mark.parametrize(
    ("files", "chosen"),
    [
        ({WEIGHTS: 1, "model.ckpt": 1, "config.json": 1}, {WEIGHTS, "config.json"}),
        ({"b.ckpt": 1, "a.ckpt": 1}, {"a.ckpt"}),
        ({"model.pt": 1, "config.json": 1}, {"model.pt", "config.json"}),
    ],
)
def test_one_weight_file_is_chosen(files: dict[str, int], chosen: set[str], tmp_path: Path) -> None:
    remote = tmp_path / "remote"
    remote.mkdir()
    for name in files:
        (remote / name).write_bytes(b"x")
    assert contents(fetch_checkpoint(f"file://{remote}", cache=tmp_path / "cache")).keys() == chosen


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no/such/folder", "vae.checkpoint: no/such/folder does not exist .relative paths start at"),
        ("memory://no/such/folder", "vae.checkpoint: memory://no/such/folder does not exist"),
        ("memory://no/such.ckpt", "does not exist"),
        ("nope://bucket/x", "vae.checkpoint: cannot open nope://bucket/x: .*nope"),
        ("http://127.0.0.1:9/x.ckpt", "vae.checkpoint: .*http://127.0.0.1:9/x.ckpt"),
    ],
)
def test_what_is_not_there(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        fetch_checkpoint(url, cache=tmp_path)


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "remote").mkdir()
    (tmp_path / "remote/config.json").write_bytes(b"{}")
    with pytest.raises(ConfigError, match=r"holds no config\.json with safetensors and no \.ckpt"):
        fetch_checkpoint(f"file://{tmp_path}/remote", cache=tmp_path / "cache")


def test_the_hub_without_a_network_is_a_clear_error(tmp_path: Path) -> None:
    """In a process of its own: the hub's client reads its settings when it is imported."""
    pytest.importorskip("huggingface_hub")
    code = (
        "from pathlib import Path\n"
        "from pipeline.checkpoints import fetch_checkpoint\n"
        "from pipeline.errors import ConfigError\n"
        f"try: fetch_checkpoint('hf://AILab-CVC/CV-VAE/vae3d_v1-1', cache=Path({str(tmp_path)!r}))\n"
        "except ConfigError as error: print('ConfigError:', error)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.stdout.startswith("ConfigError: vae.checkpoint: "), run.stderr
    assert "hf://AILab-CVC/CV-VAE/vae3d_v1-1" in run.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("vae3d")]


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LATENTS_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "cvvae-latents"
    monkeypatch.setenv("LATENTS_CACHE", "/scratch/latents")
    assert cache_folder() == Path("/scratch/latents")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "expected either vae.checkpoint or vae.spec, got neither"),
        ({"checkpoint": "x", "spec": "cvvae-sd21-tiny"}, "got both"),
        ({"spec": "no-such-vae"}, "vae.spec: expected one of .*'cvvae-sd21-tiny'.*, got 'no-such-vae'"),
        ({"checkpoint": "s3://user:hush@bucket/x"}, "user:password"),
    ],
)
def test_a_source_is_one_of_two(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as caught:
        VAESource(**fields)
    assert "hush" not in str(caught.value)


def test_loading_gives_the_weights_that_were_named(tmp_path: Path) -> None:
    seeded = load_source(VAESource(spec="cvvae-sd21-tiny", seed=3))
    assert seeded.weights_sha256 != load_source(VAESource(spec="cvvae-sd21-tiny", seed=4)).weights_sha256
    save_vae(seeded, tmp_path / "vae")
    sha256 = hashlib.sha256((tmp_path / "vae" / WEIGHTS).read_bytes()).hexdigest()
    for url in (str(tmp_path / "vae"), f"file://{tmp_path}/vae"):
        loaded = load_source(VAESource(checkpoint=url), cache=tmp_path / "cache")
        assert loaded.weights_sha256 == sha256, "wherever it was fetched from"
        for name, tensor in seeded.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
            assert tensor.dtype == torch.float32
