"""OD-VAE's checkpoints in every form they are trained and released in."""

import json
from dataclasses import replace

import pytest
import torch

from cvvae import load_vae, save_vae, seeded_vae, weights_sha256
from cvvae.od_vae import ODVAE_SPECS
from cvvae.od_vae_checkpoint import config_from_spec, spec_from_config

TINY = ODVAE_SPECS["od-vae-tiny"]
FULL = ODVAE_SPECS["od-vae"]

RELEASED_CONFIG = """{"_class_name": "CausalVAEModel", "_diffusers_version": "0.27.2", "hidden_size": 128,
"hidden_size_mult": [1, 2, 4, 4], "z_channels": 4, "embed_dim": 4, "num_res_blocks": 2, "attn_resolutions": [],
"resolution": 256, "dropout": 0.0, "double_z": true, "q_conv": "CausalConv3d", "encoder_conv_in": "Conv2d",
"encoder_conv_out": "CausalConv3d", "encoder_attention": "AttnBlock3DFix", "encoder_mid_resnet": "ResnetBlock3D",
"encoder_resnet_blocks": ["ResnetBlock2D", "ResnetBlock2D", "ResnetBlock3D", "ResnetBlock3D"],
"encoder_spatial_downsample": ["Downsample", "Spatial2xTime2x3DDownsample", "Spatial2xTime2x3DDownsample", ""],
"encoder_temporal_downsample": ["", "", "", ""], "decoder_conv_in": "CausalConv3d",
"decoder_conv_out": "CausalConv3d", "decoder_attention": "AttnBlock3DFix", "decoder_mid_resnet": "ResnetBlock3D",
"decoder_resnet_blocks": ["ResnetBlock3D", "ResnetBlock3D", "ResnetBlock3D", "ResnetBlock3D"],
"decoder_spatial_upsample": ["", "SpatialUpsample2x", "Spatial2xTime2x3DUpsample", "Spatial2xTime2x3DUpsample"],
"decoder_temporal_upsample": ["", "", "", ""], "lr": 1e-05, "loss_type": "some.module.Loss",
"loss_params": {"kl_weight": 1e-06}, "in_channels": 3, "out_channels": 3}"""


@pytest.fixture(scope="module")
def vae():
    return seeded_vae(TINY, seed=3)


def test_the_released_config_is_read_with_its_dead_fields():
    assert spec_from_config(json.loads(RELEASED_CONFIG), where="hub") == FULL


def test_a_saved_config_has_the_authors_fields_and_no_others():
    released = json.loads(RELEASED_CONFIG)
    for field in ("_diffusers_version", "lr", "loss_type", "loss_params", "in_channels", "out_channels"):
        del released[field]
    assert config_from_spec(FULL) == released | {"use_quant_layer": True}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"encoder_conv_in": "CausalConv3d"}, "encoder_conv_in: expected 'Conv2d' .*got 'CausalConv3d'"),
        ({"decoder_attention": "AttnBlock3D"}, "decoder_attention: expected 'AttnBlock3DFix'"),
        ({"encoder_temporal_downsample": ["", "TimeDownsample2x", "", ""]}, "encoder_temporal_downsample: expected"),
        ({"use_quant_layer": False}, "use_quant_layer: expected True"),
        ({"hidden_size": "128"}, "hidden_size: expected an integer, got '128'"),
        ({"hidden_size_mult": 4}, "hidden_size_mult: expected a list of integers, got 4"),
        ({"embed_dim": 8}, r"embed_dim: expected z_channels \(4\), got 8"),
        ({"tile_frames": "32"}, "tile_frames: expected an integer or null, got '32'"),
        ({"scaling_factor": "big"}, "scaling_factor: expected a number, or one for each channel, got 'big'"),
        ({"tile_overlap": 0.2}, "would not line up"),
    ],
)
def test_other_networks_of_the_same_class_name_are_refused(change, message):
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        spec_from_config({**json.loads(RELEASED_CONFIG), **change}, where="the file")


def test_a_field_that_decides_may_not_be_missing():
    config = json.loads(RELEASED_CONFIG)
    del config["encoder_resnet_blocks"]
    with pytest.raises(ValueError, match=r"encoder_resnet_blocks: expected .* got nothing"):
        spec_from_config(config, where="the file")


def test_every_field_of_a_spec_survives_saving(tmp_path):
    spec = replace(
        TINY,
        name="od-vae-custom",
        widths=(32, 32, 64, 32),
        num_res_blocks=1,
        latent_channels=6,
        scaling_factor=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        shift_factor=0.25,
        tile_frames=28,
        decode_tile_frames=7,
        tile_size=512,
        tile_overlap=0.25,
    )
    assert load_vae(save_vae(seeded_vae(spec, seed=1), tmp_path)).spec == spec
    untiled = replace(spec, tile_frames=None, decode_tile_frames=None, tile_size=None)
    assert load_vae(save_vae(seeded_vae(untiled, seed=1), tmp_path)).spec == untiled


@pytest.mark.parametrize("form", ["trainer", "trainer without average", "lightning", "bare"])
def test_trained_checkpoints_are_read_whatever_holds_the_weights(form, vae, tmp_path):
    right = dict(vae.state_dict())
    wrong = {key: torch.zeros(()) for key in right}
    state = {
        "trainer": {
            "epoch": 1,
            "state_dict": {"gen_model": wrong, "dics_model": {"main.0.weight": torch.zeros(1)}},
            "ema_state_dict": {f"module.{key}": value for key, value in right.items()},
        },
        "trainer without average": {"state_dict": {"gen_model": right, "dics_model": {}}, "ema_state_dict": {}},
        "lightning": {"state_dict": right | {"loss.logvar": torch.zeros(())}},
        "bare": right,
    }[form]
    torch.save(state, tmp_path / "checkpoint.ckpt")
    (tmp_path / "config.json").write_text(json.dumps(config_from_spec(TINY)))
    for path in (tmp_path, tmp_path / "checkpoint.ckpt"):
        loaded = load_vae(path)
        assert loaded.spec == vae.spec
        assert weights_sha256(loaded) == weights_sha256(vae)


def test_the_release_before_is_not_taken_for_this_one(vae, tmp_path):
    """Version 1.1 has 2-D downsamplers under other keys."""
    state = {key: value for key, value in vae.state_dict().items() if "downsample.conv.conv" not in key}
    torch.save(state, tmp_path / "checkpoint.ckpt")
    with pytest.raises(ValueError, match="expected the keys of one of the families"):
        load_vae(tmp_path / "checkpoint.ckpt")
