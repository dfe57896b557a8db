"""IV-VAE's checkpoints: recognised from keys and shapes, whatever the file is called; ablations come back too."""

from dataclasses import replace

import pytest
import torch

from cvvae import SPECS, load_vae, save_vae, seeded_vae, weights_sha256
from cvvae.families import spec_of_tensors
from cvvae.iv_vae import IVVAE, IVVAE_SPECS
from cvvae.iv_vae_checkpoint import config_from_spec, spec_from_config

TINY = [name for name in IVVAE_SPECS if name.endswith("-tiny")]
TOLD_BY_SHAPES = [
    name for name, spec in IVVAE_SPECS.items() if (spec.time_conv == "causal") == (spec.family == "ivvae-baseline")
]


@pytest.mark.parametrize("name", ["ivvae-z4-tiny", "ivvae-z16-tiny", "ivvae-baseline-tiny"])
def test_the_flat_pth_is_loaded(name, tmp_path):
    vae = seeded_vae(SPECS[name], seed=5)
    torch.save(dict(vae.state_dict()), tmp_path / "ivvae_z8_dim96.pth")  # the name lies
    loaded = load_vae(tmp_path / "ivvae_z8_dim96.pth")
    assert loaded.spec == vae.spec
    assert weights_sha256(loaded) == weights_sha256(vae)
    assert load_vae(tmp_path).spec == vae.spec


@pytest.mark.parametrize("name", TOLD_BY_SHAPES)
def test_every_size_is_told_by_its_shapes(name):
    with torch.device("meta"):
        tensors = IVVAE(IVVAE_SPECS[name]).state_dict()
    assert spec_of_tensors(tensors, where="file") == IVVAE_SPECS[name]


@pytest.mark.parametrize("name", TINY)
def test_saved_models_come_back(name, tmp_path):
    vae = seeded_vae(SPECS[name], seed=3)
    loaded = load_vae(save_vae(vae, tmp_path))
    assert loaded.spec == vae.spec
    assert weights_sha256(loaded) == weights_sha256(vae)


def test_sizes_that_nobody_published_have_no_scale():
    spec = replace(SPECS["ivvae-z4-tiny"], latent_channels=6)
    with torch.device("meta"):
        tensors = IVVAE(spec).state_dict()
    expected = replace(spec, name="ivvae-custom", scaling_factor=1.0, shift_factor=0.0)
    assert spec_of_tensors(tensors, where="file") == expected


@pytest.mark.parametrize(
    "change",
    [{"scaling_factor": (1.0, 2.0, 3.0, 4.0)}, {"tile_frames": 16, "tile_size": 72}, {"shift_factor": 1}],
)
def test_every_field_survives_the_config(change):
    spec = replace(SPECS["ivvae-z4-tiny"], name="mine", **change)
    assert spec_from_config(config_from_spec(spec), where="file") == spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": "8"}, "width: expected int, got '8'"),
        ({"width": True}, "width: expected int, got True"),
        ({"width": 0}, "width: expected >= 1, got 0"),
        ({"time_conv": "both"}, r"time_conv: expected one of \('group_causal', 'causal'\), got 'both'"),
        ({"latent_channels": 5}, "latent_channels: expected an even number, half of it for each branch, got 5"),
        ({"branches": "one"}, "branches: expected 'one' for family 'ivvae-baseline' and two for 'ivvae'"),
        ({"time_stride": 8}, "time_stride, space_stride: expected 4 and 8, got 8 and 8"),
        ({"colour": "red"}, r"missing \[\], unknown \['colour'\]"),
    ],
)
def test_configs_that_no_model_has_are_refused(change, message):
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        spec_from_config({**config_from_spec(SPECS["ivvae-z4-tiny"]), **change}, where="the file")


def test_a_checkpoint_with_keys_missing_is_refused(tmp_path):
    state = dict(seeded_vae(SPECS["ivvae-z4-tiny"], seed=1).state_dict())
    del state["decoder.head.2.conv_2d.bias"]
    torch.save(state, tmp_path / "one.pth")
    with pytest.raises(ValueError, match=r"(?s)the 362 keys of the model.*1 missing: decoder.head.2.conv_2d.bias"):
        load_vae(tmp_path / "one.pth")
    del state["conv2.conv_3d.weight"]
    torch.save(state, tmp_path / "two.pth")
    with pytest.raises(ValueError, match=r"two.pth: missing key 'conv2.conv_3d.weight'"):
        load_vae(tmp_path / "two.pth")
