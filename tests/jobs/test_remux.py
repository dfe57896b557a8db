"""Stream copies: whole groups of pictures, the same bytes every time, clear refusals."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest

from jobs.remux import copy_span


def frames(source) -> list[np.ndarray]:
    with av.open(source) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_a_cut_holds_the_same_pictures(real_clips):
    path = real_clips["bikes.mp4"]
    cut = copy_span(path, start=1.2, stop=3.04)
    assert cut == copy_span(path, start=1.2, stop=3.04)
    assert cut.find(b"moov") < cut.find(b"mdat")
    copied = frames(io.BytesIO(cut))
    assert len(copied) == 46
    for copy, original in zip(copied, frames(str(path))[30:76], strict=True):
        np.testing.assert_array_equal(copy, original)


def test_no_keyframe_no_stream(real_clips):
    with pytest.raises(ValueError, match=r"expected a keyframe at 2\.0 s"):
        copy_span(real_clips["bikes.mp4"], start=2.0)
    with pytest.raises(ValueError, match="kind 'audio'"):
        copy_span(real_clips["bikes.mp4"], kind="audio")
