"""Image VAEs in every published layout load as the same network; what is something else is refused by name."""

import json

import pytest
import safetensors.torch
import torch

from cvvae import SPECS, save_vae, seeded_vae
from cvvae.image_vae import ImageVAE
from cvvae.image_vae_checkpoint import load_image_vae, save_image_vae
from cvvae.weights import weights_sha256

WIDTHS = (32, 64, 64)
CONFIG = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.0",
    "act_fn": "silu",
    "block_out_channels": list(WIDTHS),
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "up_block_types": ["UpDecoderBlock2D"] * 3,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "sample_size": 512,
}


@pytest.fixture(scope="module")
def vae() -> ImageVAE:
    torch.manual_seed(5)
    return ImageVAE(in_channels=3, latent_channels=4, widths=WIDTHS).eval()


def ldm_state(vae: ImageVAE) -> dict[str, torch.Tensor]:
    """The same weights under LDM's names, written block by block from its module tree."""
    own = vae.state_dict()
    state: dict[str, torch.Tensor] = {}

    def put(ldm: str, diffusers: str, *, shape=None) -> None:
        for part in ("weight", "bias"):
            tensor = own.pop(f"{diffusers}.{part}")
            state[f"{ldm}.{part}"] = tensor[..., None, None] if shape == "conv" and part == "weight" else tensor

    def put_block(ldm: str, diffusers: str) -> None:
        for name in ("norm1", "conv1", "norm2", "conv2"):
            put(f"{ldm}.{name}", f"{diffusers}.{name}")
        if f"{diffusers}.conv_shortcut.weight" in own:
            put(f"{ldm}.nin_shortcut", f"{diffusers}.conv_shortcut")

    for half in ("encoder", "decoder"):
        put(f"{half}.conv_in", f"{half}.conv_in")
        put(f"{half}.norm_out", f"{half}.conv_norm_out")
        put(f"{half}.conv_out", f"{half}.conv_out")
        put_block(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0")
        put_block(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1")
        attention = f"{half}.mid_block.attentions.0"
        put(f"{half}.mid.attn_1.norm", f"{attention}.group_norm")
        for ldm, diffusers in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0")):
            put(f"{half}.mid.attn_1.{ldm}", f"{attention}.{diffusers}", shape="conv")
    for level in range(3):
        for block in range(2):
            put_block(f"encoder.down.{level}.block.{block}", f"encoder.down_blocks.{level}.resnets.{block}")
        for block in range(3):
            put_block(f"decoder.up.{level}.block.{block}", f"decoder.up_blocks.{2 - level}.resnets.{block}")
        if level < 2:
            put(f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv")
            put(f"decoder.up.{level + 1}.upsample.conv", f"decoder.up_blocks.{1 - level}.upsamplers.0.conv")
    put("quant_conv", "quant_conv")
    put("post_quant_conv", "post_quant_conv")
    assert not own
    return state


def assert_same(loaded, vae, video):
    frames = video(1, 2, 16, 24)[0].movedim(1, 0)
    with torch.inference_mode():
        moments = vae.encode(frames)
        assert torch.equal(loaded.vae.encode(frames), moments)
        assert torch.equal(loaded.vae.decode(moments[:, :4]), vae.decode(moments[:, :4]))
    assert not loaded.vae.training
    assert not any(parameter.requires_grad for parameter in loaded.vae.parameters())


@pytest.mark.parametrize("kind", ["bare", "in a diffusion model", "safetensors"])
def test_ldm_files_are_the_network_under_other_names(kind, vae, video, tmp_path):
    state = ldm_state(vae)
    file = tmp_path / "model.ckpt"
    if kind == "bare":
        state.update({"loss.logvar": torch.zeros(())})
        torch.save({"state_dict": state}, file)
    elif kind == "in a diffusion model":
        whole = {f"first_stage_model.{key}": value for key, value in state.items()}
        whole["model.diffusion_model.out.2.weight"] = torch.zeros(1)
        torch.save({"state_dict": whole}, file)
    else:
        file = tmp_path / "model.safetensors"
        safetensors.torch.save_file({key: value.contiguous() for key, value in state.items()}, file)
    loaded = load_image_vae(file, scaling_factor=0.18215)
    assert_same(loaded, vae, video)
    assert (loaded.scaling_factor, loaded.shift_factor) == (0.18215, 0.0)
    assert loaded.weights_sha256 == weights_sha256(file)


@pytest.mark.parametrize("old_attention_names", [False, True])
def test_diffusers_folders_with_and_without_scale(old_attention_names, vae, video, tmp_path):
    state = dict(vae.state_dict())
    if old_attention_names:
        for new, old in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            state = {key.replace(f".{new}.", f".{old}."): value for key, value in state.items()}
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    loaded = load_image_vae(tmp_path)
    assert_same(loaded, vae, video)
    assert (loaded.scaling_factor, loaded.shift_factor) == (0.18215, 0.0)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "scaling_factor": 1.5, "shift_factor": 0.1}))
    loaded = load_image_vae(tmp_path, scaling_factor=1.5)
    assert (loaded.scaling_factor, loaded.shift_factor) == (1.5, 0.1)


def test_a_folder_may_hold_a_pickled_state_dict_and_must_hold_one(vae, video, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ValueError, match=r"expected .* or diffusion_pytorch_model\.bin, got \['config\.json'\]"):
        load_image_vae(tmp_path)
    torch.save(vae.state_dict(), tmp_path / "diffusion_pytorch_model.bin")
    assert_same(load_image_vae(tmp_path), vae, video)


def test_without_quant_convolutions_as_sd3_has_it(vae, video, tmp_path):
    state = {key: value for key, value in vae.state_dict().items() if "quant_conv" not in key}
    safetensors.torch.save_file(state, tmp_path / "vae.safetensors")
    loaded = load_image_vae(tmp_path / "vae.safetensors", scaling_factor=1.5305, shift_factor=0.0609)
    frames = video(1, 1, 16, 16)[:, :, 0]
    with torch.inference_mode():
        assert torch.equal(loaded.vae.encode(frames), vae.encoder(frames))
        latents = torch.randn(1, 4, 4, 4)
        assert torch.equal(loaded.vae.decode(latents), vae.decoder(latents))
    assert loaded.shift_factor == 0.0609


def test_a_saved_image_vae_comes_back(vae, video, tmp_path):
    folder = save_image_vae(vae, tmp_path / "saved", scaling_factor=0.7, shift_factor=0.2)
    assert sorted(file.name for file in folder.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = load_image_vae(folder)
    assert_same(loaded, vae, video)
    assert (loaded.scaling_factor, loaded.shift_factor) == (0.7, 0.2)


def test_diffusers_reads_what_is_saved_and_gives_the_same_numbers(vae, video, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    save_image_vae(vae, tmp_path, scaling_factor=0.7)
    theirs = diffusers.AutoencoderKL.from_pretrained(tmp_path)
    assert theirs.config.scaling_factor == 0.7
    frames = video(1, 2, 16, 24)[0].movedim(1, 0)
    with torch.inference_mode():
        moments = vae.encode(frames)
        expected = theirs.encode(frames).latent_dist
        assert (moments - torch.cat([expected.mean, expected.logvar], 1)).abs().max() < 1e-4
        assert (vae.decode(moments[:, :4]) - theirs.decode(moments[:, :4]).sample).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "AutoencoderTiny"}, "_class_name: expected 'AutoencoderKL', got 'AutoencoderTiny'"),
        ({"layers_per_block": 3}, "layers_per_block: expected 2, got 3"),
        ({"act_fn": "relu"}, "act_fn: expected 'silu', got 'relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types: expected 'DownEncoderBlock2D'"),
        ({"scaling_factor": "big"}, "scaling_factor: expected a number, got 'big'"),
        ({"scaling_factor": 0.5}, "scaling_factor: expected 0.18215, got 0.5"),
    ],
)
def test_configs_of_another_network_are_refused(change, message, vae, tmp_path):
    safetensors.torch.save_file(vae.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **change}))
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        load_image_vae(tmp_path, scaling_factor=0.18215)


def test_a_file_alone_needs_a_scale_and_a_video_vae_is_none(vae, tmp_path):
    file = tmp_path / "vae.safetensors"
    safetensors.torch.save_file(vae.state_dict(), file)
    with pytest.raises(ValueError, match=r"vae\.safetensors: scaling_factor: expected one"):
        load_image_vae(file)
    safetensors.torch.save_file({key: t for key, t in vae.state_dict().items() if "mid_block" not in key}, file)
    with pytest.raises(ValueError, match=r"expected the 200 keys of the model, got\n  .. missing: .*mid_block"):
        load_image_vae(file, scaling_factor=1.0)
    video_vae = save_vae(seeded_vae(SPECS["cvvae-sd3-tiny"], seed=1), tmp_path / "video")
    with pytest.raises(ValueError, match="expected a 2-D convolution's of an image VAE, got shape"):
        load_image_vae(video_vae / "diffusion_pytorch_model.safetensors", scaling_factor=1.0)
    with pytest.raises(FileNotFoundError):
        load_image_vae(tmp_path / "nowhere.safetensors", scaling_factor=1.0)
