"""A place and an ffmpeg for making awkward clips."""

from __future__ import annotations

import pytest

from tests.awkward_clips import ClipMaker


@pytest.fixture(scope="session")
def maker(ffmpeg: str, tmp_path_factory: pytest.TempPathFactory) -> ClipMaker:
    return ClipMaker(ffmpeg, tmp_path_factory.mktemp("clips"))
