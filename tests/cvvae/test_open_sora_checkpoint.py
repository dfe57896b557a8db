"""Open-Sora's checkpoints: sizes, shift and scale come from the tensors."""

import json
from dataclasses import replace

import pytest
import safetensors.torch
import torch

from cvvae import SPECS, load_vae, save_vae, seeded_vae, weights_sha256
from cvvae.open_sora_checkpoint import constants, spec_from_config
from cvvae.open_sora_vae import OpenSoraSpec

TINY = SPECS["open-sora-1.2-tiny"]
FULL = SPECS["open-sora-1.2"]
assert isinstance(TINY, OpenSoraSpec)
assert isinstance(FULL, OpenSoraSpec)

AUTHORS_CONFIG = {
    "model_type": "VideoAutoencoderPipeline",
    "architectures": ["VideoAutoencoderPipeline"],
    "torch_dtype": "float32",
    "transformers_version": "4.38.2",
    "vae_2d": {
        "type": "VideoAutoencoderKL",
        "from_pretrained": "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers",
        "subfolder": "vae",
        "micro_batch_size": 4,
        "local_files_only": False,
    },
    "vae_temporal": {"type": "VAE_Temporal_SD", "from_pretrained": None},
    "from_pretrained": None,
    "freeze_vae_2d": False,
    "cal_loss": False,
    "micro_frame_size": None,
    "shift": 0.0,
    "scale": 1.0,
}


@pytest.fixture(scope="module")
def vae():
    return seeded_vae(TINY, seed=3)


def write(folder, vae, config, changes=None, *, dtype=torch.float32):
    state = {**vae.state_dict(), **constants(vae.spec)} | (changes or {})
    state = {key: value.to(dtype).contiguous() for key, value in state.items()}
    safetensors.torch.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_config_has_no_say_in_what_the_authors_loader_overrides(vae, tmp_path):
    assert spec_from_config(AUTHORS_CONFIG, where="hub") == FULL
    loaded = load_vae(write(tmp_path, vae, AUTHORS_CONFIG))
    assert loaded.spec == TINY
    assert weights_sha256(loaded) == weights_sha256(vae)
    assert load_vae(tmp_path / "model.safetensors").spec == TINY


def test_half_precision_does_not_round_the_scale(vae, tmp_path):
    assert load_vae(write(tmp_path, vae, AUTHORS_CONFIG, dtype=torch.bfloat16)).spec == TINY


def test_the_checkpoints_scale_wins_over_the_config(vae, tmp_path):
    scale, shift = torch.tensor([2.0, 4.0, 0.5, 8.0]), torch.tensor([0.5, 0.0, 1.0, -1.0])
    state = {"scale": scale.view(1, 4, 1, 1, 1), "shift": shift.view(1, 4, 1, 1, 1)}
    spec = load_vae(write(tmp_path, vae, AUTHORS_CONFIG, state)).spec
    assert spec.scaling_factor == (0.5, 0.25, 2.0, 0.125)
    assert spec.shift_factor == (0.5, 0.0, 1.0, -1.0)
    assert spec.name == "open-sora-1.2-custom"


def test_every_field_of_a_spec_survives_saving(tmp_path):
    spec = replace(
        TINY,
        name="open-sora-1.2-custom",
        widths=(32, 32, 32, 64),
        temporal_widths=(32, 32, 64, 64),
        latent_channels=6,
        scaling_factor=0.3,
        shift_factor=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
        tile_frames=None,
    )
    loaded = load_vae(save_vae(seeded_vae(spec, seed=1), tmp_path))
    assert loaded.spec == spec
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "_class_name: expected one of .* got 'bert'"),
        ({"vae_temporal": {"type": "VAE_Temporal_XL"}}, "vae_temporal: expected type 'VAE_Temporal_SD', got"),
        ({"vae_2d": "image"}, "vae_2d: expected type 'VideoAutoencoderKL', got 'image'"),
        ({"tile_frames": 16}, r"tile_frames: expected 1 \+ 4\*k or None, got 16"),
    ],
)
def test_unsupported_configs_are_refused(change, message, vae, tmp_path):
    with pytest.raises(ValueError, match=f"config.json: .*{message}"):
        load_vae(write(tmp_path, vae, AUTHORS_CONFIG | change))


def test_checkpoints_without_scale_or_with_a_wrong_one_are_refused(vae, tmp_path):
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in vae.state_dict().items()}, tmp_path / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"model.safetensors: missing key 'scale'"):
        load_vae(tmp_path)
    with pytest.raises(ValueError, match=r"scale: expected numbers other than 0"):
        load_vae(write(tmp_path, vae, AUTHORS_CONFIG, {"scale": torch.zeros(1, 4, 1, 1, 1)}))
    with pytest.raises(ValueError, match=r"1 of another shape: shift \(expected \(1, 4, 1, 1, 1\), got \(4,\)\)"):
        load_vae(write(tmp_path, vae, AUTHORS_CONFIG, {"shift": torch.ones(4)}))
