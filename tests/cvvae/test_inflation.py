"""Inflation is exact where it can be, says how far off it is elsewhere, and refuses an image VAE of another space."""

import copy
from dataclasses import replace

import pytest
import torch

from cvvae.cv_vae import CVVAE_SPECS
from cvvae.image_vae import ImageVAE
from cvvae.image_vae_checkpoint import LoadedImageVAE
from cvvae.inflation import deviations, fold_quant_convs, frame_by_frame, inflate
from cvvae.regularization import decode_images, encode_images

WIDTHS = (32, 32, 64, 64)
SD21 = replace(CVVAE_SPECS["cvvae-sd21-tiny"], widths=WIDTHS)
SD3 = replace(CVVAE_SPECS["cvvae-sd3-tiny"], widths=WIDTHS)
ROUNDING = 2e-5
"""Relative RMS."""


def image_vae_for(spec, seed: int = 0) -> LoadedImageVAE:
    """Random weights with biases and gains of a trained network's size."""
    torch.manual_seed(seed)
    vae = ImageVAE(in_channels=3, latent_channels=spec.latent_channels, widths=spec.widths)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(("norm" in name and "weight" in name) + 0.1 * torch.randn(parameter.shape))
    return LoadedImageVAE(
        vae=vae.eval().requires_grad_(False),
        scaling_factor=spec.scaling_factor,
        shift_factor=spec.shift_factor,
        weights_sha256="of the test",
    )


def without_post_quant_bias(image: LoadedImageVAE) -> LoadedImageVAE:
    torch.nn.init.zeros_(image.vae.post_quant_conv.bias)
    return image


def relative_rms(got, expected):
    assert got.shape == expected.shape
    return float((got - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("time_stride", [2, 4, 8])
@pytest.mark.parametrize("half_3d", [True, False])
def test_z4_with_frame_norms_is_the_image_vae(time_stride, half_3d, video):
    """Encoder: the last frame of each group. Decoder, attention over time left out: every frame of the group."""
    spec = replace(SD21, time_stride=time_stride, half_3d=half_3d)
    image = without_post_quant_bias(image_vae_for(spec))
    clip = video(2, 1 + 2 * time_stride, 24, 16)
    twin = frame_by_frame(inflate(image, spec), eps=1e-6, attends_over_time=False)
    with torch.inference_mode():
        latents = encode_images(image.vae, clip[:, :, ::time_stride])
        posterior = twin.encode(clip)
        assert relative_rms(posterior.mean, latents.mean) < ROUNDING
        assert relative_rms(posterior.logvar, latents.logvar) < ROUNDING
        frames = decode_images(image.vae, latents.mean)
        repeated = torch.cat([frames[:, :, :1], frames[:, :, 1:].repeat_interleave(time_stride, dim=2)], dim=2)
        assert relative_rms(twin.decode(latents.mean), repeated) < ROUNDING


def test_encoding_an_image_is_exact_as_it_is_but_for_epsilon(video):
    image = image_vae_for(SD21)
    vae = inflate(image, SD21)
    for module in vae.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.eps = 1e-6
    picture = video(2, 1, 32, 24)
    with torch.inference_mode():
        assert relative_rms(vae.encode(picture).mean, encode_images(image.vae, picture).mean) < ROUNDING


def test_post_quant_bias_is_folded_exactly_inside_and_wrong_in_the_border():
    image = image_vae_for(SD21)
    folded = fold_quant_convs(image.vae)
    latents = torch.randn(2, 4, 8, 6)
    with torch.inference_mode():
        first, expected = (
            vae.decoder.get_submodule("conv_in")(vae.post_quant_conv(latents)) for vae in (folded, image.vae)
        )
    assert relative_rms(first[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1]) < ROUNDING
    assert relative_rms(first, expected) > 1e-3


def test_static_clips_keep_their_latents_though_norms_pool_over_frames(video):
    image = image_vae_for(SD21)
    still = video(1, 1, 32, 24).expand(-1, -1, 9, -1, -1)
    moving = video(1, 9, 32, 24)
    vae = inflate(image, SD21)
    off_still, off_moving = (deviations(vae, image.vae, clip)["as inflated"].latents for clip in (still, moving))
    assert off_still < 1e-3  # epsilon
    assert off_moving > 10 * off_still


def test_deviations_shrink_as_the_obstacles_go(video):
    image = without_post_quant_bias(image_vae_for(SD21))
    clip = video(1, 9, 32, 24)
    off = deviations(inflate(image, SD21, frames_NCHW=clip[0].movedim(1, 0)), image.vae, clip)
    as_inflated, frame_norms, no_attention = off.values()
    assert as_inflated.latents > 1e-3
    assert frame_norms.latents < ROUNDING
    assert 1e-4 < frame_norms.pixels < 0.5
    assert no_attention.pixels < ROUNDING


def test_time_attention_starts_near_the_identity(video):
    """Against what it would be with PyTorch's initialisation, and against leaving the attention out altogether."""
    image = without_post_quant_bias(image_vae_for(SD21))
    clip = video(1, 9, 48, 32)
    fitted, random, silent = (inflate(image, SD21, frames_NCHW=clip[0].movedim(1, 0)) for _ in range(3))
    for layer in (random.decoder.mid.attn_1.get_submodule(name) for name in ("q_t", "k_t", "v_t", "proj_out_t")):
        layer.reset_parameters()
    for parameter in silent.decoder.mid.attn_1.proj_out_t.parameters():
        torch.nn.init.zeros_(parameter)
    off = [deviations(vae, image.vae, clip)["norms per frame"].pixels for vae in (fitted, random, silent)]
    assert off[0] < 0.5 * min(off[1:])


def padded_as_in_sd3(image_vae):
    """As the SD3 layout: edges repeated but in each block's second convolution, downsamplers padded all round."""
    padded = copy.deepcopy(image_vae)
    for parent in list(padded.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, torch.nn.Conv2d) and child.kernel_size == (3, 3) and name != "conv2":
                conv = torch.nn.Conv2d(
                    child.in_channels, child.out_channels, 3, child.stride, 1, padding_mode="replicate"
                )
                conv.load_state_dict(child.state_dict())
                parent.add_module(name, conv)
    for level in range(len(image_vae.widths) - 1):
        samplers = padded.encoder.get_submodule(f"down_blocks.{level}.downsamplers")
        samplers.add_module("0", samplers.get_submodule("0.conv"))
    return padded


def test_sd3_deviates_by_its_padding_alone_and_the_figure_is_reported(video):
    image = image_vae_for(SD3)
    vae = inflate(image, SD3)
    clip = video(1, 9, 40, 32)
    off = deviations(vae, image.vae, clip)
    assert set(off) == {"as inflated", "norms per frame", "norms per frame, no attention over time"}
    assert off["norms per frame"] == off["norms per frame, no attention over time"]
    assert off["norms per frame"].latents > 1e-2
    assert off["norms per frame"].pixels > 1e-2
    padded = deviations(vae, padded_as_in_sd3(image.vae), clip)["norms per frame"]
    assert padded.latents < ROUNDING
    assert padded.pixels < ROUNDING


def test_inflation_is_deterministic_and_leaves_the_image_vae_alone():
    image = image_vae_for(SD21)
    before = {key: value.clone() for key, value in image.vae.state_dict().items()}
    torch.manual_seed(1)
    first = inflate(image, SD21)
    torch.manual_seed(2)
    second = inflate(image, SD21)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert all(torch.equal(before[key], value) for key, value in image.vae.state_dict().items())
    assert all(parameter.requires_grad for parameter in first.parameters())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (SD3, r"latent_channels: expected 16, got 4; scaling_factor: expected 1.5305, got 0.18215; shift_factor"),
        (replace(SD21, widths=(32, 64, 64, 64)), r"widths: expected \(32, 64, 64, 64\), got \(32, 32, 64, 64\)"),
        (replace(SD21, in_channels=1), "in_channels: expected 1, got 3"),
        (replace(SD21, scaling_factor=0.13025), "scaling_factor: expected 0.13025, got 0.18215"),
        (replace(SD21, num_res_blocks=3), "num_res_blocks: expected 3, got 2"),
    ],
)
def test_an_image_vae_of_another_space_is_refused(spec, message):
    with pytest.raises(ValueError, match=f"image VAE for spec 'cvvae-.*{message}"):
        inflate(image_vae_for(SD21), spec)
