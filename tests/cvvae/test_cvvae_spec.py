"""Specs: shapes follow from strides, contradictions are refused, the JSON form is stable."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvvae import SPECS, build_vae, spec_from_dict
from cvvae.cv_vae import levels_that_halve_time

SD21 = SPECS["cvvae-sd21"]


@given(num_frames=st.integers(1, 10_000), stride=st.sampled_from([2, 4, 8]))
def test_largest_valid_length_is_valid_and_nearest(num_frames, stride):
    spec = replace(SD21, time_stride=stride)
    valid = spec.largest_valid_num_frames(num_frames)
    assert spec.is_valid_num_frames(valid)
    assert num_frames - stride < valid <= num_frames
    assert spec.num_video_frames(spec.num_latent_frames(valid)) == valid


def test_latent_shape_of_the_papers_block():
    assert SD21.latent_shape(17, 576, 576) == (4, 5, 72, 72)
    assert SPECS["cvvae-sd3"].latent_shape(1, 512, 768) == (16, 1, 64, 96)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 64, 64), r"expected 1 \+ 4\*k .* got 16; the nearest shorter is 13, the nearest longer 17"),
        ((0, 64, 64), "video frames T: expected at least 1, got 0"),
        ((17, 60, 64), "height: expected a positive multiple of 8 .* got 60"),
        ((17, 64, 0), "width: expected a positive multiple of 8 .* got 0"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        SD21.latent_shape(*shape)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile_size": 64}, "tile_size=64 .* would not line up"),
        ({"tile_size": 100}, "tile_size: expected a positive multiple of 8, got 100"),
        ({"tile_frames": 6}, "tile_frames: expected a positive multiple of time_stride=4 or None, got 6"),
        ({"tile_overlap": 0.7}, "tile_overlap: expected 0 to 0.5, got 0.7"),
        ({"widths": (100,)}, "widths: expected positive multiples of norm_groups=32"),
        ({"time_stride": 0}, "time_stride: expected >= 1, got 0"),
        ({"scaling_factor": 0.0}, "scaling_factor"),
    ],
)
def test_contradictory_specs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SD21, **change)


def test_specs_are_named_by_their_key_and_survive_json():
    for name, spec in SPECS.items():
        text = json.dumps(spec.to_dict())
        assert spec.name == name
        assert spec_from_dict(json.loads(text)) == spec
        assert json.dumps(spec_from_dict(json.loads(text)).to_dict()) == text


def test_from_dict_names_missing_and_unknown_fields():
    values = SD21.to_dict()
    values["colour"] = values.pop("widths")
    with pytest.raises(ValueError, match=r"missing \['widths'\], unknown \['colour'\]"):
        spec_from_dict(values)


@pytest.mark.parametrize(
    ("time_stride", "halving"), [(1, "000"), (2, "100"), (4, "101"), (8, "111")], ids=["x1", "x2", "x4", "x8"]
)
def test_every_time_stride_can_be_built(time_stride, halving, video):
    spec = replace(SPECS["cvvae-sd21-tiny"], time_stride=time_stride)
    assert levels_that_halve_time(spec) == tuple(digit == "1" for digit in halving)
    vae = build_vae(spec)
    with torch.inference_mode():
        mean = vae.encode(video(1, 9, 16, 16)).mean
        assert mean.shape[1:] == spec.latent_shape(9, 16, 16)
        assert vae.decode(mean).shape == (1, 3, 9, 16, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"time_stride": 16}, r"time_stride: expected one of \[1, 2, 4, 8\], got 16"),
        ({"widths": (32, 64), "tile_size": None}, "space_stride: expected 2 for 2 widths, got 8"),
        ({"family": "no-such-vae"}, "family: expected one of .* got 'no-such-vae'"),
    ],
)
def test_specs_that_no_network_has_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        build_vae(replace(SPECS["cvvae-sd21-tiny"], **change))
