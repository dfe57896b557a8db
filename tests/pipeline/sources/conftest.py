"""Fixtures of the source tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from pipeline.storage import Store
from tests.pipeline.sources.tar_cases import (
    SMALL_TAR,
    Member,
    Outcome,
    read_url,
    tar_bytes,
)
from tests.s3_server import S3Server


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Outcome]:
    """Read a tar given as bytes or as members."""

    def read_tar(content: bytes | Iterable[Member], **options: Any) -> Outcome:
        data = content if isinstance(content, bytes) else tar_bytes(content)
        path = tmp_path / "00000.tar"
        path.write_bytes(data)
        outcome = read_url(str(path), **options)
        assert outcome.sha256 == hashlib.sha256(data).hexdigest(), "of the whole file, damaged or not"
        return outcome

    return read_tar


@pytest.fixture
def whole(read: Callable[..., Outcome]) -> Outcome:
    outcome = read(SMALL_TAR)
    assert len(outcome.clips) == 3
    assert outcome.rejections == []
    return outcome


@pytest.fixture
def bucket(s3_server: S3Server, request: pytest.FixtureRequest) -> Store:
    store = Store(f"{s3_server.url}/{request.function.__name__}", options=s3_server.options)
    for number in range(3):
        store.create(f"{number:05d}.tar", SMALL_TAR)
    return store
