"""A sample's pixels: which frames, which crop; pictures in children that may die."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline.decode.blob import Blob
from pipeline.decode.frames import open_frames
from pipeline.errors import ClipError, RejectionClass
from pipeline.records import Clip
from pipeline.training.samples import Cut, SampleDecoder, draw_cut
from pipeline.training.settings import SampleSource


def source(**changes: object) -> SampleSource:
    plain = {"name": "clips", "urls": "unused", "frames": 5, "size": [32, 48], "short_side": 64}
    return SampleSource.model_validate(plain | changes)


CLIPS = source()
PICTURES = source(media="image", frames=1)


@pytest.fixture(scope="module")
def decoder() -> Iterator[SampleDecoder]:
    with SampleDecoder(1, (CLIPS, PICTURES)) as decoder:
        yield decoder


def clip_of(data: bytes) -> Clip:
    return Clip(
        key="k", shard_id="s", video=Blob.from_bytes(data), video_sha256="", file_name="k", caption="", metadata={}
    )


def cut(stride: int = 1, start: int = 0, at: tuple[float, float] = (0.0, 0.0)) -> Cut:
    return Cut(frame_stride=stride, start=start, short_side=64, at=at)


def numbered(real_clips: dict[str, Path], numbers: list[int]) -> np.ndarray:
    """Those frames of the carphone clip (176x144, pixels wider than high: 190 x 144), resized and cropped by hand."""
    found = []
    with open_frames(str(real_clips["carphone_pristine.mp4"]), "pyav") as frames:
        for frame in frames:
            if frame.number in numbers:
                image = Image.fromarray(frame.rgb()).resize((85, 64), Image.Resampling.BICUBIC)
                found.append(np.asarray(image))
    return np.stack(found)


@pytest.mark.parametrize(("stride", "start", "expected"), [(1, 0, range(5)), (3, 0, range(0, 15, 3))])
def test_frames_by_stride(
    decoder: SampleDecoder, real_clips: dict[str, Path], stride: int, start: int, expected: range
) -> None:
    clip = clip_of(real_clips["carphone_pristine.mp4"].read_bytes())
    got_THWC = decoder.decode(clip, CLIPS, cut(stride, start))
    assert got_THWC.shape == (5, 32, 48, 3)
    near_THWC = numbered(real_clips, list(expected))[:, :32, :48].astype(int)
    # the crop to a bucket's aspect moves the picture by less than a pixel
    assert np.abs(got_THWC - near_THWC).mean() < 6
    others = numbered(real_clips, [n + 40 for n in expected])[:, :32, :48].astype(int)
    assert np.abs(got_THWC - near_THWC).mean() < 0.7 * np.abs(got_THWC - others).mean()


def test_a_later_start_shows_later_frames(decoder: SampleDecoder, real_clips: dict[str, Path]) -> None:
    data = real_clips["carphone_pristine.mp4"].read_bytes()
    whole = decoder.decode(clip_of(data), source(frames=17), cut())
    assert np.array_equal(decoder.decode(clip_of(data), CLIPS, cut(start=12)), whole[12:17])
    assert np.array_equal(decoder.decode(clip_of(data), CLIPS, cut(start=118)), whole[:5]), "beyond its end: frame 0"


def test_a_clip_too_short_for_the_stride_is_read_at_a_smaller_one(
    decoder: SampleDecoder, real_clips: dict[str, Path]
) -> None:
    data = real_clips["carphone_pristine.mp4"].read_bytes()  # 120 frames: 17 of them every 8th are too many
    wide = source(frames=17)
    assert np.array_equal(decoder.decode(clip_of(data), wide, cut(8)), decoder.decode(clip_of(data), wide, cut(4)))
    with pytest.raises(ClipError) as refused:
        decoder.decode(clip_of(data), source(frames=121), cut(2))
    assert refused.value.error_class is RejectionClass.TOO_SHORT


def test_crops_lie_where_the_cut_says(decoder: SampleDecoder, real_clips: dict[str, Path]) -> None:
    data = real_clips["carphone_pristine.mp4"].read_bytes()
    whole = decoder.decode(clip_of(data), source(size=[64, 64]), cut())
    assert np.array_equal(decoder.decode(clip_of(data), CLIPS, cut())[:, :, :48], whole[:, :32, :48])
    low = decoder.decode(clip_of(data), CLIPS, cut(at=(1.0, 0.0)))
    assert np.array_equal(low, whole[:, 32:, :48])


def test_pictures(decoder: SampleDecoder, tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8)[None, :, None], (100, 200, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "ramp.png")
    data = (tmp_path / "ramp.png").read_bytes()
    left = decoder.decode(clip_of(data), PICTURES, cut(at=(0.5, 0.0)))
    right = decoder.decode(clip_of(data), PICTURES, cut(at=(0.5, 1.0)))
    assert left.shape == (1, 32, 48, 3)
    # 200 x 100 becomes 128 x 64: 48 columns show 75 of the ramp's levels
    assert left[0, 0, 0, 0] <= 2
    assert 71 <= left[0, 0, -1, 0] <= 77
    assert right[0, 0, -1, 0] >= 197


def test_what_is_no_picture_is_a_rejection_and_a_dead_child_is_replaced(
    decoder: SampleDecoder, tmp_path: Path
) -> None:
    with pytest.raises(ClipError, match="UnidentifiedImageError"):
        decoder.decode(clip_of(b"\xff\xd8 no"), PICTURES, cut())
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "grey.png")
    data = (tmp_path / "grey.png").read_bytes()
    assert decoder.decode(clip_of(data), PICTURES, cut()).max() == 9
    assert decoder._images is not None
    process = decoder._images._all[0]._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert decoder.decode(clip_of(data), PICTURES, cut()).max() == 9


def test_cuts_follow_from_their_seed() -> None:
    wide = source(frame_stride=[1, 8], max_start=50, short_side=[48, 90])
    cuts = [draw_cut(wide, f"seed/{k}") for k in range(200)]
    assert cuts == [draw_cut(wide, f"seed/{k}") for k in range(200)]
    assert {one.frame_stride for one in cuts} == set(range(1, 9))
    assert min(one.short_side for one in cuts) == 48
    assert max(one.short_side for one in cuts) == 90
    assert draw_cut(source(crop="center", frame_stride=[2, 8]), "x") == Cut(
        frame_stride=2, start=0, short_side=64, at=(0.5, 0.5)
    )
