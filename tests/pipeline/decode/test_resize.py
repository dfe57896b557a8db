"""Bucket choice, crop and resampling, against their definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline.decode.resize import choose_bucket, crop_box, resizer_for
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import ResizePolicy
from pipeline.records import SourceVideo

sides = st.integers(1, 4000)
aspects = st.sampled_from([1.0, 128 / 117, 4 / 3, 9 / 16, 3 / 4, 64 / 45])
bucket_sides = st.integers(1, 64).map(lambda side: side * 16)
bucket_lists = st.lists(st.tuples(bucket_sides, bucket_sides), min_size=1, max_size=6, unique=True).map(tuple)


def video(width: int, height: int, sample_aspect_ratio: float = 1.0) -> SourceVideo:
    return SourceVideo(
        width=width,
        height=height,
        sample_aspect_ratio=sample_aspect_ratio,
        rotation=0,
        fps=25.0,
        duration=1.0,
        codec="h264",
        decoder="none",
    )


@given(sides, sides, aspects, bucket_lists)
def test_the_bucket_nearest_in_display_aspect(width, height, aspect, buckets) -> None:
    chosen = choose_bucket(width, height, aspect, buckets)
    display = width * aspect / height

    def distance(bucket: tuple[int, int]) -> float:
        return abs(math.log(bucket[1] / bucket[0]) - math.log(display))

    assert distance(chosen) <= min(map(distance, buckets)) + 1e-8


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((640, 272), (256, 256)),  # the largest that needs no upscaling
        ((640, 640), (512, 512)),
        ((100, 100), (128, 128)),  # none: the smallest
        ((256, 256), (256, 256)),
        ((255, 256), (128, 128)),
    ],
)
def test_among_equals_the_largest_without_upscaling_else_the_smallest(size, expected) -> None:
    buckets = ((512, 512), (128, 128), (256, 256))
    assert choose_bucket(*size, 1.0, buckets) == expected
    assert choose_bucket(*size, 1.0, buckets[::-1]) == expected


def test_the_sample_aspect_ratio_decides() -> None:
    """360-degree video: 1920x1080 stored, square when shown."""
    assert choose_bucket(1920, 1080, 9 / 16, ((256, 448), (256, 256))) == (256, 256)
    assert choose_bucket(1920, 1080, 1.0, ((256, 448), (256, 256))) == (256, 448)


@given(sides, sides, aspects, st.tuples(bucket_sides, bucket_sides))
def test_the_crop_is_centred_inside_as_large_as_can_be_and_undistorted(width, height, aspect, bucket) -> None:
    x, y, kept_width, kept_height = crop_box(width, height, aspect, bucket)
    assert 0 <= x <= x + kept_width <= width * (1 + 1e-12)
    assert 0 <= y <= y + kept_height <= height * (1 + 1e-12)
    assert x + kept_width / 2 == pytest.approx(width / 2)
    assert y + kept_height / 2 == pytest.approx(height / 2)
    assert kept_width == pytest.approx(width) or kept_height == pytest.approx(height)
    assert kept_width * aspect / kept_height == pytest.approx(bucket[1] / bucket[0])


@given(st.integers(1, 300), st.integers(1, 300), aspects, st.tuples(st.integers(1, 80), st.integers(1, 80)))
def test_any_size_fits_any_bucket(width, height, aspect, bucket) -> None:
    """Rounding never puts the box outside the picture, and a flat picture stays flat."""
    frame = np.full((height, width, 3), (10, 120, 250), np.uint8)
    resized = resizer_for(video(width, height, aspect), ResizePolicy(buckets=(bucket,)))(frame)
    assert resized.shape == (*bucket, 3)
    assert np.array_equal(np.unique(resized.reshape(-1, 3), axis=0), [[10, 120, 250]])


def test_equal_size_is_the_identity_and_turned_arrays_are_read_right() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    assert np.array_equal(resizer_for(video(64, 48), ResizePolicy(buckets=((48, 64),)))(frame), frame)
    turned = np.rot90(frame)
    assert np.array_equal(resizer_for(video(48, 64), ResizePolicy(buckets=((64, 48),)))(turned), turned)


@pytest.mark.parametrize("name", ["bilinear", "bicubic", "lanczos"])
def test_the_filter_is_antialiased_pillow(name: str) -> None:
    """One-pixel stripes become flat grey, where a filter without antialiasing keeps stripes."""
    frame = np.zeros((256, 256, 3), np.uint8)
    frame[:, ::2] = 255
    policy = ResizePolicy.model_validate({"buckets": [(64, 64)], "filter": name})
    resized = resizer_for(video(256, 256), policy)(frame)
    assert np.abs(resized[8:-8, 8:-8].astype(int) - 127).max() <= 3
    pillow = Image.fromarray(frame).resize((64, 64), Image.Resampling[name.upper()])
    assert np.array_equal(resized, np.asarray(pillow))


def test_upscaling_is_refused_where_the_policy_says_so() -> None:
    policy = ResizePolicy(buckets=((256, 256),), upscale="reject")
    assert resizer_for(video(300, 256), policy).bucket == (256, 256)
    assert resizer_for(video(192, 256, 4 / 3), policy).bucket == (256, 256)  # shown 256 wide
    with pytest.raises(ClipError, match="300x255") as caught:
        resizer_for(video(300, 255), policy)
    assert caught.value.error_class is RejectionClass.TOO_SMALL
    assert resizer_for(video(30, 25), ResizePolicy(buckets=((256, 256),))).bucket == (256, 256)
