"""Folders as diffusers writes them: which spec they are, what is refused, and back."""

import inspect
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from cvvae import SPECS, build_vae, load_vae, save_vae, seeded_vae, spec_from_dict, weights_sha256
from cvvae.diffusers_config import reciprocal
from cvvae.diffusers_vae import DiffusersSpec
from cvvae.families import FAMILIES, family_of, spec_of_config

PROJECT = Path(__file__).parents[2]
PEERS = sorted(name for name, spec in SPECS.items() if isinstance(spec, DiffusersSpec))
TINY = [name for name in PEERS if name.endswith("-tiny")]
PUBLISHED = [name for name in PEERS if not name.endswith("-tiny")]

# What the published config.json files say beyond the defaults of their class, and older ones leave out.
CONFIGS = {
    "sd": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "flux": {
        "_class_name": "AutoencoderKL",
        "_diffusers_version": "0.30.0.dev0",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "latent_channels": 16,
        "latents_mean": None,
        "latents_std": None,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "wan21": {"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.33.0.dev0", "attn_scales": [], "z_dim": 16},
    "cogvideox-5b": {
        "_class_name": "AutoencoderKLCogVideoX",
        "sample_height": 480,
        "sample_width": 720,
        "scaling_factor": 0.7,
        "shift_factor": None,
        "temporal_compression_ratio": 4.0,
    },
    "svd": {
        "_class_name": "AutoencoderKLTemporalDecoder",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "force_upcast": True,
        "layers_per_block": 2,
        "sample_size": 768,
        "scaling_factor": 0.18215,
    },
    "hunyuan15": {"_class_name": "AutoencoderKLHunyuanVideo15", "scaling_factor": 1.03682, "latent_channels": 32},
    "ltx-0.9.0": {"_class_name": "AutoencoderKLLTXVideo", "scaling_factor": 1.0, "decoder_causal": False},
    "hunyuan": {"_class_name": "AutoencoderKLHunyuanVideo", "scaling_factor": 0.476986},
    "mochi": {"_class_name": "AutoencoderKLMochi", "scaling_factor": 1.0, "in_channels": 15},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_published_configs_are_recognised(name):
    spec = spec_of_config(CONFIGS[name], where="config.json")
    assert spec == SPECS[name]
    assert json.dumps(spec.to_dict()) == json.dumps(SPECS[name].to_dict()), "one model has one identity"


@pytest.mark.parametrize("name", PEERS)
def test_a_spec_comes_back_from_its_config(name):
    spec = SPECS[name]
    family = family_of(spec)
    config = json.loads(json.dumps(family.config_from_spec(spec)))
    read = family.spec_from_config(config, where="config.json")
    assert family.spec_with_tensors(read, family.constants(spec), where="weights") == spec


def test_driving_and_tiles_survive_saving(tmp_path):
    spec = replace(SPECS["wan21-tiny"], name="wan-custom", chunk_frames=8, tile_frames=16, tile_size=64)
    pytest.importorskip("diffusers")
    assert load_vae(save_vae(build_vae(spec), tmp_path)).spec == spec


REFUSED = {
    "an argument that nobody knows": ({"wavelets": True}, r"known here, got \['wavelets'\]"),
    "a patch that is not the channels'": ({"patch_size": 2}, "in_channels: expected 12, RGB in patches of 2, got 3"),
    "attention at other places": ({"attn_scales": [0.5]}, r"attn_scales: expected \(\), got \(0.5,\)"),
    "another time stride": ({"temperal_downsample": [True, True, True]}, "expected two halvings of time"),
    "a stride the network has not": ({"scale_factor_spatial": 16}, "scale_factor_spatial: expected 8"),
    "another kind": ({"base_dim": "96"}, "base_dim: expected what is like 96, got '96'"),
    "too few means": ({"latents_mean": [0.0], "latents_std": [1.0]}, "latents_(mean|std): expected 16 numbers"),
    "a mean alone": ({"latents_mean": [0.0] * 16}, "expected both or neither"),
    "a deviation of 0": ({"latents_mean": [0.0] * 16, "latents_std": [0.0] * 16}, "other than 0"),
    "a factor the class has not": ({"scaling_factor": 0.5}, "AutoencoderKLWan has no such argument, got 0.5"),
    "a chunk that is none": ({"chunk_frames": 6}, "chunk_frames: expected a positive multiple of 4, got 6"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_another_model_is_refused(what):
    change, message = REFUSED[what]
    with pytest.raises(ValueError, match=message) as raised:
        spec_of_config({"_class_name": "AutoencoderKLWan", **change}, where="here/config.json")
    assert str(raised.value).startswith("here/config.json: ")


OTHERS_REFUSED = {
    "cogvideox with 1x1 convolutions": (
        "AutoencoderKLCogVideoX",
        {"use_quant_conv": True},
        "use_quant_conv: expected",
    ),
    "cogvideox of an odd chunk": ("AutoencoderKLCogVideoX", {"chunk_frames": 4}, "positive multiple of 8"),
    "ltx in patches of time": ("AutoencoderKLLTXVideo", {"patch_size_t": 2}, "patch_size_t: expected 1"),
    "ltx with a wrong ratio": ("AutoencoderKLLTXVideo", {"spatial_compression_ratio": 16}, "expected 32"),
    "ltx told noise it has no input for": ("AutoencoderKLLTXVideo", {"decode_timestep": 0.05}, "expected 0 to 0"),
    "a class nobody here knows": ("AutoencoderKLAllegro", {}, "_class_name: expected one of"),
}


@pytest.mark.parametrize("what", OTHERS_REFUSED)
def test_what_other_classes_cannot_do_is_refused(what):
    name, change, message = OTHERS_REFUSED[what]
    with pytest.raises(ValueError, match=message):
        spec_of_config({"_class_name": name, **change}, where="config.json")


@pytest.mark.parametrize("name", TINY)
def test_a_spec_at_odds_with_its_config_is_refused(name):
    spec = SPECS[name]
    assert isinstance(spec, DiffusersSpec)
    with pytest.raises(ValueError, match="which follow from config"):
        replace(spec, space_stride=2 * spec.space_stride)
    with pytest.raises(ValueError, match="config: expected each argument"):
        replace(spec, config=spec.config[1:])


@pytest.mark.parametrize("name", TINY)
def test_diffusers_reads_what_is_saved_and_saves_what_is_read(name, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    vae = seeded_vae(SPECS[name], seed=3)
    assert isinstance(vae.spec, DiffusersSpec)
    kind = getattr(diffusers, vae.spec.peer.name)
    model = kind.from_pretrained(save_vae(vae, tmp_path / "ours"))
    for key, value in vae.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    model.save_pretrained(tmp_path / "theirs")
    assert weights_sha256(load_vae(tmp_path / "theirs")) == weights_sha256(vae)


def test_stable_diffusions_files_have_the_attention_keys_of_2022(tmp_path):
    pytest.importorskip("diffusers")
    vae = seeded_vae(SPECS["sd-tiny"], seed=3)
    save_vae(vae, tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(file)
    for new, before in old.items():
        for key in [key for key in tensors if f".{new}." in key]:
            tensors[key.replace(f".{new}.", f".{before}.")] = tensors.pop(key)
    safetensors.torch.save_file(tensors, file)
    assert weights_sha256(load_vae(tmp_path)) == weights_sha256(vae)


def test_statistics_of_ltx_come_from_its_weights(tmp_path):
    pytest.importorskip("diffusers")
    vae = seeded_vae(SPECS["ltx-0.9.0-tiny"], seed=3)
    file = save_vae(vae, tmp_path) / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors["latents_mean"], tensors["latents_std"] = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    safetensors.torch.save_file(tensors, file)
    spec = load_vae(tmp_path).spec
    assert spec.name == "ltx-0.9.0-tiny"
    assert spec.shift_factor == tuple(tensors["latents_mean"].double().tolist())
    assert spec.scaling_factor == tuple((1 / tensors["latents_std"].double()).tolist())
    assert load_vae(save_vae(load_vae(tmp_path), tmp_path / "again")).spec == spec
    del tensors["latents_std"]
    safetensors.torch.save_file(tensors, file)
    with pytest.raises(ValueError, match="latents_std: expected a tensor"):
        load_vae(tmp_path)


def test_a_bare_file_needs_its_config(tmp_path):
    pytest.importorskip("diffusers")
    file = save_vae(seeded_vae(SPECS["sd-tiny"], seed=3), tmp_path) / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"VAEs of diffusers need their config\.json beside them"):
        load_vae(file)


# Millions of parameters, counted in diffusers 0.42.1.
PARAMETERS = {
    "sd": 84,
    "svd": 98,
    "cogvideox-2b": 216,
    "wan21": 127,
    "wan22": 705,
    "hunyuan": 246,
    "hunyuan15": 1261,
    "ltx-0.9.0": 419,
    "ltx2": 1222,
    "mochi": 460,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_build(name):
    pytest.importorskip("diffusers")
    with torch.device("meta"):
        vae = FAMILIES[SPECS[name].family].build(SPECS[name])
    assert {key for key, _ in vae.named_buffers()} <= set(vae.state_dict()), "a buffer no checkpoint fills"
    if name in PARAMETERS:
        assert round(sum(value.numel() for value in vae.parameters()) / 1e6) == PARAMETERS[name]


def test_reciprocals_come_back():
    for value in (2.8184, 0.4765, 1.0, 0.9263795028493863, 1e-3, 3.0):
        assert 1 / reciprocal(1 / value) == 1 / value
    assert reciprocal(1 / 2.8184) == 2.8184


WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers":
            raise ModuleNotFoundError(f"No module named {name!r}", name="diffusers")
sys.meta_path.insert(0, Missing())
"""


def test_without_diffusers_specs_are_read_and_models_say_what_to_install():
    code = WITHOUT + (
        "from cvvae import SPECS, seeded_vae, spec_from_dict\n"
        f"specs = [SPECS[name] for name in {PEERS!r}]\n"
        "assert [spec_from_dict(spec.to_dict()) for spec in specs] == specs\n"
        "try:\n    seeded_vae(SPECS['wan21-tiny'], seed=0)\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT, check=False)
    assert done.returncode == 0, done.stderr
    assert "pip install 'cvvae-latents[peers]'" in done.stdout


@pytest.mark.parametrize("name", PEERS)
def test_a_spec_is_json(name):
    assert spec_from_dict(json.loads(json.dumps(SPECS[name].to_dict()))) == SPECS[name]


@pytest.mark.parametrize(
    "name", [name for name, family in FAMILIES.items() if issubclass(family.spec_type, DiffusersSpec)]
)
def test_the_arguments_of_a_class_and_their_defaults_are_those_of_diffusers(name):
    """A release that adds an argument or changes a default is another network for the same config.json."""
    diffusers = pytest.importorskip("diffusers")
    spec_type = FAMILIES[name].spec_type
    assert issubclass(spec_type, DiffusersSpec)
    peer = spec_type.peer
    signature = inspect.signature(getattr(diffusers, peer.name).__init__).parameters
    defaults = {key: value.default for key, value in signature.items() if key != "self"}
    normalisation = {"scaling_factor", "shift_factor", "latents_mean", "latents_std"}
    assert set(defaults) - normalisation <= {*peer.arguments, *peer.ignored}
    assert set(peer.normalised_by) <= set(defaults)
    for key, expected in peer.arguments.items():
        default = defaults[key]
        assert (tuple(default) if isinstance(default, list) else default) == expected, key


def test_a_dataset_of_another_release_can_be_described_and_not_continued():
    """Readers need the spec alone; encoding with another release would be other numbers under the same name."""
    pytest.importorskip("diffusers")
    spec = replace(SPECS["wan21-tiny"], diffusers="0.41")
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    with pytest.raises(ValueError, match=r"diffusers: expected a release 0\.41\.x, got 0\.42"):
        seeded_vae(spec, seed=0)
