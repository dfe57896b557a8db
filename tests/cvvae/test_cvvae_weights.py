"""Checkpoints in every form they are released in, strict matching, and no pickle."""

import json
import pickle
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from cvvae import SPECS, build_vae, load_vae, save_vae, seeded_vae, weights_sha256
from cvvae.cv_vae_checkpoint import config_from_spec, spec_from_config

TINY = ["cvvae-sd21-tiny", "cvvae-sd21-full3d-tiny", "cvvae-sd3-tiny"]


def assert_same_weights(got, expected):
    assert got.spec == expected.spec
    assert weights_sha256(got) == weights_sha256(expected)


@pytest.mark.parametrize("name", TINY)
def test_saved_models_come_back(name, tmp_path):
    vae = seeded_vae(SPECS[name], seed=3)
    loaded = load_vae(save_vae(vae, tmp_path / "saved"))
    weights, config = (tmp_path / "saved" / name for name in ("diffusion_pytorch_model.safetensors", "config.json"))
    assert weights.stat().st_mode == config.stat().st_mode, "whoever may read the one may read the other"
    assert_same_weights(loaded, vae)
    assert loaded.weights_sha256 == weights_sha256(tmp_path / "saved")
    assert loaded.weights_sha256 == weights_sha256(tmp_path / "saved" / "diffusion_pytorch_model.safetensors")
    assert sorted(file.name for file in (tmp_path / "saved").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]


@pytest.mark.parametrize("name", ["cvvae-sd21-tiny", "cvvae-sd3-tiny"])
def test_every_field_of_a_spec_survives_saving(name, tmp_path):
    spec = replace(
        SPECS[name],
        name=f"{SPECS[name].family}-custom",
        widths=(32, 64),
        norm_groups=16,
        num_res_blocks=1,
        time_stride=2,
        space_stride=2,
        latent_channels=6,
        scaling_factor=0.5,
        shift_factor=0.25,
        tile_frames=None,
        tile_size=144,
    )
    vae = seeded_vae(spec, seed=3)
    assert_same_weights(load_vae(save_vae(vae, tmp_path)), vae)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("form", ["bare", "training state", "directory"])
def test_pickled_checkpoints_are_recognised_by_their_keys(name, form, tmp_path):
    vae = seeded_vae(SPECS[name], seed=4)
    state = dict(vae.state_dict())
    if form == "training state":
        state |= {"loss.logvar": torch.zeros(()), "loss.discriminator.main.0.weight": torch.zeros(4, 3, 3, 3, 3)}
        torch.save({"state_dict": state, "global_step": 7}, tmp_path / "misleading-sd3-name.ckpt")
    else:
        torch.save(state, tmp_path / "misleading-sd3-name.ckpt")
    path = tmp_path if form == "directory" else tmp_path / "misleading-sd3-name.ckpt"
    assert_same_weights(load_vae(path), vae)


def test_half_precision_files_are_upcast(tmp_path, video):
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=5)
    loaded = load_vae(save_vae(vae.half(), tmp_path))
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_same_weights(loaded, vae.float())
    assert load_vae(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16
    with torch.inference_mode():
        loaded.encode(video(1, 1, 8, 8))


RELEASED_CONFIG = """{"_class_name": "CVVAEModel", "_diffusers_version": "0.29.2", "attn_resolutions": [],
"causal_decoder": false, "causal_encoder": true, "ch": 128, "ch_mult": [1, 2, 4, 4],
"decoder_attn_type": "spatial-temporal-xformer", "double_z": true, "dropout": 0.0, "en_de_n_frames_a_time": 16,
"encoder_attn_type": "vanilla-xformers", "force_upcast": true, "half_3d": true, "in_channels": 3, "num_res_blocks": 2,
"num_video_frames": null, "out_ch": 3, "reshape_x_dim_to_4": false, "reshape_z_dim_to_4": false,
"scaling_factor": 0.18215, "spatial_n_compress": 8, "tile_overlap_ratio": 0.2222, "tile_spatial_size": 576,
"time_n_compress": 4, "use_3d_conv": true, "z_channels": 4}"""


def test_the_released_config_is_read_and_written():
    released = json.loads(RELEASED_CONFIG)
    assert spec_from_config(released, where="hub") == SPECS["cvvae-sd21"]
    del released["_diffusers_version"]
    assert config_from_spec(SPECS["cvvae-sd21"]) == released


def test_the_sd3_config_needs_no_fields_and_states_no_scale():
    assert spec_from_config({"_class_name": "CVVAESD3Model"}, where="hub") == SPECS["cvvae-sd3"]
    assert not {"scaling_factor", "shift_factor"} & set(config_from_spec(SPECS["cvvae-sd3"]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "_class_name: expected one of .* got 'AutoencoderKL'"),
        ({"causal_decoder": True}, "causal_decoder: expected False, got True"),
        (
            {"encoder_attn_type": "linear"},
            "encoder_attn_type: expected 'vanilla-xformers' or 'vanilla', got 'linear'",
        ),
        ({"colour": "red"}, "colour: expected a field of CVVAEModel, got an unknown one = 'red'"),
        ({"z_channels": "4"}, "latent_channels: expected a int, got '4'"),
        ({"ch_mult": 4}, "ch_mult: expected a list of integers, got 4"),
        ({"out_ch": 1}, "out_ch: expected in_channels, got 1"),
        ({"tile_spatial_size": 64}, "would not line up"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=f"the file: .*{message}"):
        spec_from_config({**json.loads(RELEASED_CONFIG), **change}, where="the file")


def test_wrong_keys_are_listed_with_shapes_and_capped(tmp_path):
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=6)
    save_vae(vae, tmp_path)
    state = {key: value.contiguous() for key, value in vae.state_dict().items() if not key.startswith("decoder.mid")}
    state["decoder.conv_out.bias"] = torch.zeros(4)
    state["decoder.surprise"] = torch.zeros(1)
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="expected the 254 keys of the model") as caught:
        load_vae(tmp_path)
    text = str(caught.value)
    assert "36 missing: decoder.mid.attn_1.k.bias, " in text
    assert "and 26 more" in text
    assert "1 unexpected: decoder.surprise" in text
    assert "1 of another shape: decoder.conv_out.bias (expected (3,), got (4,))" in text


class _Evil:
    def __reduce__(self):
        return (pytest.fail, ("a class in a checkpoint was executed",))


def test_nothing_but_tensors_is_unpickled(tmp_path):
    torch.save({"state_dict": {"encoder.conv_in.weight": torch.zeros(1)}, "hook": _Evil()}, tmp_path / "evil.ckpt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(_Evil(), protocol=2))
    for name in ("evil.ckpt", "plain.pth"):
        with pytest.raises(ValueError, match=f"{name}: expected a readable file of tensors"):
            load_vae(tmp_path / name)


def test_paths_that_hold_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint file or directory"):
        load_vae(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"exactly one .ckpt, .pth or .pt file, got \[\]"):
        load_vae(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"expected a .safetensors, .ckpt"):
        load_vae(tmp_path / "notes.txt")
    (tmp_path / "broken.safetensors").write_bytes(b"\x08broken")
    with pytest.raises(ValueError, match="expected a readable file of tensors"):
        load_vae(tmp_path / "broken.safetensors")
    torch.save({"unet.weight": torch.zeros(1)}, tmp_path / "unet.ckpt")
    with pytest.raises(ValueError, match="expected the keys of one of the families"):
        load_vae(tmp_path / "unet.ckpt")


def test_the_hash_names_the_weights_not_their_layout():
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=7)
    name = vae.weights_sha256
    for parameter in vae.parameters():
        parameter.data = parameter.data.contiguous()
    assert name == weights_sha256(vae) == weights_sha256(seeded_vae(vae.spec, seed=7))
    with torch.no_grad():
        next(vae.parameters()).view(-1)[0] += 1
    assert weights_sha256(vae) != name
    assert seeded_vae(vae.spec, seed=8).weights_sha256 != name
    assert build_vae(vae.spec).weights_sha256 is None
