"""The policies: what they refuse, above all anything that looks like a credential."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from pipeline.policies import (
    DecodePolicy,
    EncodePolicy,
    Policy,
    PublicUrl,
    ResizePolicy,
    StoreOptions,
    WindowPolicy,
    refuse_secrets,
)

POLICIES: list[Policy] = [WindowPolicy(), ResizePolicy(), DecodePolicy(), EncodePolicy()]
HUSH = "hush-hush"


class Place(Policy):
    """A section with a URL and options, as sources, outputs and checkpoints are."""

    url: PublicUrl = "s3://bucket"
    options: StoreOptions


SECRET_OPTIONS: list[dict[str, Any]] = [
    {"key": HUSH},
    {"secret": HUSH},
    {"token": HUSH},
    {"password": HUSH},
    {"PASSWD": HUSH},
    {"aws_access_key_id": HUSH, "aws_secret_access_key": HUSH},
    {"aws_session_token": HUSH},
    {"account_key": HUSH},
    {"sas_token": HUSH},
    {"connection_string": f"AccountKey={HUSH}"},
    {"credential": HUSH},
    {"password": 12345678},
    {"secret": b"hush-hush"},
    {"token": {"type": "service_account", "private_key": HUSH}},
    {"client_kwargs": {"aws_secret_access_key": HUSH}},
    {"a": [{"b": {"secret": HUSH}}]},
    {"target_options": [{"key": HUSH}]},
    {"endpoint_url": f"http://user:{HUSH}@host:9000"},
    {"proxies": ["http://ok", f"http://user:{HUSH}@host"]},
]
SECRET_URLS = [
    f"s3://user:{HUSH}@bucket/x",
    f"ftp://user:{HUSH}@host/x.tar",
    f"ftp://:{HUSH}@host/x.tar",
    f"filecache::ftp://user:{HUSH}@host/x.tar",
    f"https://bucket.s3.amazonaws.com/x.tar?X-Amz-Algorithm=A&X-Amz-Signature={HUSH}",
    f"https://storage.googleapis.com/b/x.tar?X-Goog-Signature={HUSH}",
    f"https://account.blob.core.windows.net/c/x.tar?sv=2026&sig={HUSH}",
    f"https://host/x.tar?access_token={HUSH}",
]


@pytest.mark.parametrize("options", SECRET_OPTIONS, ids=repr)
def test_options_hold_no_credentials(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="environment") as caught:
        Place(options=options)
    assert HUSH not in str(caught.value), "the error does not print it"
    assert "12345678" not in str(caught.value)


@pytest.mark.parametrize("url", SECRET_URLS)
def test_urls_hold_no_credentials(url: str) -> None:
    with pytest.raises(ValidationError, match="environment") as caught:
        Place(url=url)
    assert HUSH not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"endpoint_url": "http://127.0.0.1:8333", "anon": True, "use_ssl": False},
        {"client_kwargs": {"region_name": "eu-west-1"}, "config_kwargs": {"retries": {"max_attempts": 3}}},
        {"token": None},
        {"token": False},
        {"requester_pays": True, "default_block_size": 1 << 20},
        {"s3_additional_kwargs": {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": "arn:aws:kms:1:2:key/3"}},
    ],
    ids=repr,
)
def test_ordinary_options_pass(options: dict[str, Any]) -> None:
    assert Place(options=options).options == options
    refuse_secrets(options)


@pytest.mark.parametrize(
    "url",
    ["s3://bucket/a@b:c.tar", "http://host:9000/x.tar", "hf://owner/repo@main/x", "memory://x", "s3://b/{0..9}.tar"],
)
def test_ordinary_urls_pass_unchanged(url: str) -> None:
    assert Place(url=url).url == url


def test_local_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker has another working directory: it must find the driver's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert Place(url="data/*.tar").url == f"{tmp_path}/data/*.tar"
    assert Place(url="./a/../b/").url == f"{tmp_path}/b"
    assert Place(url="~/data").url == "/home/somebody/data"
    assert Place(url="/data/x").url == "/data/x"
    moved = pickle.dumps(Place(url="data"))
    monkeypatch.chdir("/")
    assert pickle.loads(moved).url == f"{tmp_path}/data"


@pytest.mark.parametrize("policy", POLICIES, ids=lambda one: type(one).__name__)
def test_policies_are_frozen_strict_and_survive_json(policy: Policy) -> None:
    kind = type(policy)
    name = next(iter(kind.model_fields))
    with pytest.raises(ValidationError, match="frozen"):
        setattr(policy, name, getattr(policy, name))
    with pytest.raises(ValidationError, match="Extra inputs"):
        kind.model_validate({"no_such_setting": 1})
    assert kind.model_validate(policy.model_dump(mode="json")) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy


REFUSED: list[tuple[type[BaseModel], dict[str, Any]]] = [
    (WindowPolicy, {"frames": 0}),
    (WindowPolicy, {"frames": 17.5}),
    (WindowPolicy, {"fps": 0}),
    (WindowPolicy, {"fps": float("inf")}),
    (WindowPolicy, {"fps": float("nan")}),
    (WindowPolicy, {"frame_stride": 0}),
    (WindowPolicy, {"window_stride": 0}),
    (WindowPolicy, {"max_windows": 0}),
    (WindowPolicy, {"tail": "keep"}),
    (WindowPolicy, {"min_tail_frames": 0}),
    (ResizePolicy, {"buckets": []}),
    (ResizePolicy, {"buckets": [[256]]}),
    (ResizePolicy, {"buckets": [[256, 256, 3]]}),
    (ResizePolicy, {"buckets": [[256, 0]]}),
    (ResizePolicy, {"buckets": [[256, 128], [256, 128]]}),
    (ResizePolicy, {"filter": "nearest"}),
    (ResizePolicy, {"upscale": "maybe"}),
    (DecodePolicy, {"backends": []}),
    (DecodePolicy, {"backends": ["pyav", "pyav"]}),
    (DecodePolicy, {"backends": ["ffmpeg"]}),
    (DecodePolicy, {"cpu_seconds": 0}),
    (DecodePolicy, {"memory_mb": 127}),
    (DecodePolicy, {"max_clip_bytes": 0}),
    (DecodePolicy, {"threads": 0}),
    (DecodePolicy, {"windows_in_flight": 0}),
    (EncodePolicy, {"dtype": "float64"}),
    (EncodePolicy, {"storage_dtype": "int8"}),
    (EncodePolicy, {"batch_pixels": 0}),
    (EncodePolicy, {"memory_format": "nhwc"}),
    (EncodePolicy, {"threads": 0}),
]


@pytest.mark.parametrize(("kind", "fields"), REFUSED, ids=repr)
def test_values_out_of_range_are_refused(kind: type[BaseModel], fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        kind.model_validate(fields)


def test_window_stride_defaults_to_no_overlap() -> None:
    assert WindowPolicy(frames=33).stride == 33
    assert WindowPolicy(frames=33, window_stride=16).stride == 16
