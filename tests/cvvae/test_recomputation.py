"""Gradient checkpointing of blocks changes no number and no gradient, and does run blocks again."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch

from cvvae import SPECS, DiagonalGaussian, seeded_vae
from cvvae.discriminator import PatchDiscriminator3d
from cvvae.image_vae import ImageVAE
from cvvae.iv_vae_layers import ResBlock as BranchResBlock
from cvvae.layers import ResBlock, set_recomputation
from cvvae.losses import LossWeights, VAELoss
from cvvae.regularization import Regularization, forward_pass


def pass_and_gradients(vae, clip):
    """Outputs and gradients of one training-like pass, and how often each residual block ran."""
    runs: Counter[str] = Counter()
    for name, module in vae.named_modules():
        if isinstance(module, ResBlock | BranchResBlock):
            module.register_forward_pre_hook(lambda module, args, name=name: runs.update([name]))
    clip = clip.clone().requires_grad_()
    posterior = vae.encode(clip)
    pixels = vae.decode(posterior.mean)
    (pixels.square().mean() + posterior.kl().mean()).backward()
    gradients = {name: parameter.grad for name, parameter in vae.named_parameters()}
    return [pixels.detach(), posterior.mean.detach(), clip.grad], gradients, runs


@pytest.mark.parametrize("name", ["cvvae-sd21-tiny", "cvvae-sd3-tiny", "ivvae-z4-tiny"])
def test_numbers_and_gradients_are_equal(name, video):
    clip = video(1, 9, 16, 16)
    plain = seeded_vae(SPECS[name], seed=3).train()
    recomputing = copy.deepcopy(plain)
    set_recomputation(recomputing, True)
    outputs, gradients, runs = pass_and_gradients(plain, clip)
    outputs_again, gradients_again, runs_again = pass_and_gradients(recomputing, clip)
    for got, expected in zip(outputs_again, outputs, strict=True):
        assert torch.equal(got, expected)
    for key, expected in gradients.items():
        if expected is None:
            assert gradients_again[key] is None
        else:
            torch.testing.assert_close(gradients_again[key], expected, rtol=1e-5, atol=1e-6)
    assert runs_again == Counter({block: 2 * count for block, count in runs.items()})


def test_the_whole_loss_with_its_adaptive_weight_is_the_same(video):
    """The adaptive weight takes gradients of its own before the backward pass, through the recomputed blocks."""
    torch.manual_seed(0)
    discriminator = PatchDiscriminator3d(width=32).requires_grad_(False)
    image_vae = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32, 32, 32)).requires_grad_(False)
    clip, results = video(1, 5, 16, 16), []
    for recomputes in (False, True):
        vae = seeded_vae(replace(SPECS["cvvae-sd21-tiny"], widths=(32, 32, 32, 32)), seed=3).train()
        for module in (vae, image_vae):
            set_recomputation(module, recomputes)
        module = VAELoss(LossWeights(), Regularization(mapping="slice"))
        forward = forward_pass(vae, clip, module.regularization, image_vae=image_vae, draw=DiagonalGaussian.mode)
        loss, metrics = module.generator_loss(
            forward.video_BCTHW,
            forward.posterior,
            forward.reconstruction_BCTHW,
            step=1,
            decoder_side=forward.decoder_side,
            discriminator=discriminator,
            last_layer=vae.decoder.conv_out.weight,
        )
        loss.backward()
        results.append((metrics, {name: parameter.grad for name, parameter in vae.named_parameters()}))
    (metrics, gradients), (metrics_again, gradients_again) = results
    assert metrics["adversarial_weight"] > 0
    assert metrics_again == pytest.approx(metrics)
    for key, expected in gradients.items():
        torch.testing.assert_close(gradients_again[key], expected, rtol=1e-4, atol=1e-4)


def test_without_gradients_nothing_runs_twice_and_the_switch_goes_back(video):
    vae = seeded_vae(SPECS["cvvae-sd21-tiny"], seed=3)
    set_recomputation(vae, True)
    runs = []
    vae.encoder.mid.block_1.register_forward_pre_hook(lambda module, args: runs.append(1))
    with torch.no_grad():
        vae.encode(video(1, 1, 16, 16))
    assert len(runs) == 1
    set_recomputation(vae, False)
    vae.encode(video(1, 1, 16, 16)).mean.sum().backward()
    assert len(runs) == 2


def test_gradients_through_a_frozen_image_decoder(video):
    torch.manual_seed(0)
    vae = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32)).requires_grad_(False)
    gradients = []
    for recomputes in (False, True):
        set_recomputation(vae, recomputes)
        latents = torch.ones(2, 4, 4, 4, requires_grad=True)
        vae.decode(latents).square().sum().backward()
        gradients.append(latents.grad)
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0
