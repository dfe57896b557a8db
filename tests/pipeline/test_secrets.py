"""No secret reaches a log, an error, run.json, a receipt, a report or what Ray writes of a run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.config import EncodeConfig, load_config
from pipeline.checkpoints import fetch_checkpoint
from pipeline.errors import ConfigError, PipelineError, StorageError
from pipeline.storage import Store, object_info
from pipeline.store_errors import redact
from tests.s3_server import FaultPlan, Proxy, S3Server, proxy_to
from tests.whole_run import dataset_bytes, upload

PROJECT = Path(__file__).parents[2]
HUSH = "hush-hush-7d1f"


@pytest.mark.parametrize(
    "settings",
    [
        {"source.options": {"key": "id", "secret": HUSH}},
        {"output.options": {"client_kwargs": {"aws_secret_access_key": HUSH}}},
        {"output.options": {"token": HUSH}},
        {"vae.options": {"password": HUSH}},
        {"output.options": {"endpoint_url": f"http://user:{HUSH}@127.0.0.1:8333"}},
        {"output.options": {"endpoint_url": f"http://{HUSH}@127.0.0.1:8333"}},
        {"output.url": f"ftp://user:{HUSH}@host/latents"},
        {"source.urls": f"https://{HUSH}@host/0.tar"},
        {"source.urls": f"https://bucket.host/0.tar?X-Amz-Credential=a&X-Amz-Signature={HUSH}"},
        {"source.urls": [f"https://account.host/0.tar?sv=1&sig={HUSH}"]},
        {"vae.checkpoint": f"https://host/vae.ckpt?access_token={HUSH}", "vae.spec": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_config_that_holds_a_secret_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    raw: dict[str, Any] = {"source": {"kind": "webdataset", "urls": "in"}, "output": {"url": "out"}}
    raw["vae"] = {"spec": "cvvae-sd21-tiny"}
    for name, value in settings.items():
        section, _, field = name.partition(".")
        raw[section][field] = value
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    with pytest.raises(ConfigError, match="credential") as caught:
        load_config(EncodeConfig, tmp_path / "config.yaml")
    assert HUSH not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"no https://user:{HUSH}@host/a or ftp://u:{HUSH}@host", "no https://host/a or ftp://host"),
        (f"GET https://host/a?x=1&X-Amz-Signature={HUSH}&y=2", "GET https://host/a?x=1&X-Amz-Signature=(hidden)&y=2"),
        (f"'https://host/a?sig={HUSH}', then b@c", "'https://host/a?sig=(hidden)', then b@c"),
        ("s3://bucket/a and me@host", "s3://bucket/a and me@host"),
    ],
)
def test_texts_are_stripped_of_secrets(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_a_client_that_prints_its_url_does_not_print_a_signature() -> None:
    signed = f"http://127.0.0.1:9/vae.ckpt?X-Amz-Signature={HUSH}"
    for look in (lambda: object_info(signed), lambda: fetch_checkpoint(signed)):
        with pytest.raises((PipelineError, FileNotFoundError), match=r"127\.0\.0\.1:9") as caught:
            look()
        assert HUSH not in str(caught.value)


@pytest.fixture
def source(s3_server: S3Server, v2d_shards: Callable[..., list[Path]], tmp_path: Path) -> str:
    v2d_shards(tmp_path / "source", num_shards=2, good=1, failed=1, broken=0)
    upload(tmp_path / "source", Store(s3_server.url, options=s3_server.options), "secrets/source")
    return f"{s3_server.url}/secrets/source"


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Not under tmp_path: a Unix socket's path may have 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def encode(config: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    """The job as a user starts it, with a Ray of its own."""
    command = [sys.executable, "jobs/encode_webvid.py", str(config)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    return subprocess.run(
        command, cwd=PROJECT, env=inherited | environment, capture_output=True, timeout=280, check=False
    )


def holders(secret: str, folder: Path) -> list[Path]:
    """Files below a folder that hold the secret."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [path for path in files if secret.encode() in path.read_bytes()]


def test_a_run_on_s3_with_ray_keeps_its_secrets(
    s3_server: S3Server, source: str, tmp_path: Path, ray_folder: Path
) -> None:
    """Credentials and endpoint from the environment, tars, sidecars and Parquet output on S3, faults on the way."""
    config = {
        "source": {"kind": "webdataset", "urls": source},
        "output": {"url": f"{s3_server.url}/secrets/out", "format": "parquet"},
        "vae": {"spec": "cvvae-sd21-tiny"},
        "windows": {"max_windows": 1},
        "resize": {"buckets": [[32, 32]]},
        "encode": {"threads": 1},
        "cluster": {"num_actors": 1, "decode_children": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    secret = s3_server.secrets["tests"]

    def through(proxy: Proxy, output: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(config | {"output": {"url": f"{s3_server.url}/secrets/{output}", "format": "parquet"}})
        )
        endpoint = str(proxy.options["endpoint_url"])
        return encode(
            tmp_path / "config.yaml", {"AWS_ENDPOINT_URL": endpoint, "RAY_TMPDIR": str(ray_folder), **environment}
        )

    plan = FaultPlan(7, rate=0.2, stall_seconds=1)
    with proxy_to(s3_server, plan) as proxy:
        good = through(proxy, "out")
        assert good.returncode == 0, good.stderr.decode()
        wrong = through(proxy, "wrong", AWS_SECRET_ACCESS_KEY=HUSH)
    assert plan.drawn
    assert wrong.returncode == 1
    assert b"403" in wrong.stderr
    assert b"Traceback" not in wrong.stderr
    out = Store(f"{s3_server.url}/secrets/out", options=s3_server.options)
    stored = dataset_bytes(out) | {f"runs/{name}": out.read_bytes(f"runs/{name}") for name in out.names("runs", "")}
    assert len(stored) == 2 + 3 * 2 + 1
    stored["run.json"] = out.read_bytes("run.json")
    assert json.loads(stored["manifest.json"])["counts"]["clips_encoded"] == 2
    for text in (good.stdout, good.stderr, wrong.stdout, wrong.stderr, *stored.values()):
        assert secret.encode() not in text
        assert HUSH.encode() not in text
    assert list(ray_folder.rglob("*.out")), "Ray's own logs were there to be looked at"
    assert holders(secret, ray_folder) == []
    assert holders(HUSH, ray_folder) == []


def test_an_endpoint_with_a_password_is_refused_unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://user:{HUSH}@127.0.0.1:8333")
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL: it holds a user or a password") as caught:
        Store("s3://bucket/x")
    assert HUSH not in str(caught.value)
