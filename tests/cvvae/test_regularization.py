"""The regularization: which frames are compared, the paper's equations, and where gradients go."""

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cvvae import SPECS, DiagonalGaussian, seeded_vae
from cvvae.cv_vae import CVVAE_SPECS
from cvvae.image_vae import ImageVAE
from cvvae.losses import LossWeights, VAELoss
from cvvae.regularization import (
    MAPPINGS,
    Regularization,
    choose_frames,
    decode_images,
    encode_images,
    forward_pass,
    map_frames,
)

SPEC = replace(CVVAE_SPECS["cvvae-sd21-tiny"], widths=(32, 32, 32, 32))
EQUATIONS = Regularization(form="equations", lambda_decoder=1.0, lambda_encoder=1.0, mapping="slice")


@pytest.fixture(scope="module")
def vae():
    return seeded_vae(SPEC, seed=2).train()


@pytest.fixture(scope="module")
def image_vae():
    torch.manual_seed(1)
    return ImageVAE(in_channels=3, latent_channels=4, widths=SPEC.widths).requires_grad_(False)


@pytest.fixture(autouse=True)
def _no_gradients_left(vae):
    vae.zero_grad()


def loss_of(forward, settings, **weights):
    module = VAELoss(LossWeights(adversarial=0, **weights), settings)
    return module.generator_loss(
        forward.video_BCTHW,
        forward.posterior,
        forward.reconstruction_BCTHW,
        step=1,
        decoder_side=forward.decoder_side,
        encoder_side=forward.encoder_side,
    )


# --- the mapping psi -----------------------------------------------------------------------------------------------


def test_groups_of_frames_are_the_papers():
    assert choose_frames(SPEC, 9, "first") == ((0,),)
    assert choose_frames(SPEC, 9, "slice") == ((0,), (4,), (8,))
    assert choose_frames(SPEC, 9, "average") == ((0,), (1, 2, 3, 4), (5, 6, 7, 8))
    assert all(choose_frames(SPEC, 1, mapping) == ((0,),) for mapping in MAPPINGS)


@given(stride=st.sampled_from([2, 4, 8]), groups=st.integers(0, 5), seed=st.integers(0, 2**32))
def test_one_random_frame_of_each_group(stride, groups, seed):
    spec = replace(SPEC, time_stride=stride)
    choice = choose_frames(spec, 1 + stride * groups, "random", torch.Generator().manual_seed(seed))
    assert choice == choose_frames(spec, 1 + stride * groups, "random", torch.Generator().manual_seed(seed))
    assert choice[0] == (0,)
    for group, (frame,) in enumerate(choice[1:]):
        assert 1 + stride * group <= frame <= stride * (group + 1)


def test_random_frames_are_uniform_and_groups_draw_apart():
    generator = torch.Generator().manual_seed(0)
    draws = [choose_frames(SPEC, 9, "random", generator) for _ in range(800)]
    counts = Counter((draw[1][0] - 1, draw[2][0] - 5) for draw in draws)
    assert len(counts) == 16
    assert all(20 <= count <= 85 for count in counts.values())  # 50 expected, standard deviation 7


def test_frames_are_taken_or_averaged_for_the_whole_batch(video):
    clip = video(2, 9, 8, 8)
    assert torch.equal(map_frames(clip, ((0,), (3,), (8,))), clip[:, :, [0, 3, 8]])
    mapped = map_frames(clip, choose_frames(SPEC, 9, "average"))
    assert torch.equal(mapped[:, :, 0], clip[:, :, 0])
    assert torch.allclose(mapped[:, :, 2], (clip[:, :, 5] + clip[:, :, 6] + clip[:, :, 7] + clip[:, :, 8]) / 4)


def test_other_families_have_groups_of_their_own():
    spec = SPECS["open-sora-1.2-tiny"]
    num_frames = spec.largest_valid_num_frames(17)
    last = [frames[-1] for frames in choose_frames(spec, num_frames, "slice")]
    assert last == [spec.frame_span(latent)[1] - 1 for latent in range(spec.num_latent_frames(num_frames))]


# --- the equations -------------------------------------------------------------------------------------------------


def test_both_sides_are_equations_1_and_2(vae, image_vae, video):
    clip = video(2, 9, 16, 16)
    forward = forward_pass(vae, clip, EQUATIONS, image_vae=image_vae, draw=DiagonalGaussian.mode)
    latent = vae.encode(clip).mean
    for number, frame in enumerate((0, 4, 8)):
        assert torch.equal(forward.decoder_side.target[:, :, number], clip[:, :, frame])
        torch.testing.assert_close(
            forward.decoder_side.prediction[:, :, number], image_vae.decode(latent[:, :, number]), rtol=0, atol=1e-5
        )
    image_latent = torch.stack([image_vae.encode(clip[:, :, frame])[:, :4] for frame in (0, 4, 8)], dim=2)
    torch.testing.assert_close(forward.encoder_side.prediction, vae.decode(image_latent), rtol=0, atol=1e-5)
    assert torch.equal(forward.encoder_side.target, clip)
    weights = {"pixel_error": "squared", "log_variance": "fixed", "kl": 0}
    loss, _ = loss_of(forward, replace(EQUATIONS, lambda_decoder=0.5, lambda_encoder=2.0), **weights)
    by_hand = (
        (clip - vae.decode(latent)).square().sum() / 18
        + 0.5 * (forward.decoder_side.target - forward.decoder_side.prediction).square().sum() / 6
        + 2.0 * (clip - forward.encoder_side.prediction).square().sum() / 18
    )
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_first_frame_mapping_compares_one_frame(vae, image_vae, video):
    settings = Regularization(mapping="first", lambda_encoder=0.5, form="equations")
    forward = forward_pass(vae, video(1, 9, 16, 16), settings, image_vae=image_vae)
    for comparison in (forward.decoder_side, forward.encoder_side):
        assert comparison.target.shape == comparison.prediction.shape == (1, 3, 1, 16, 16)


def test_the_codes_encoder_side_doubles_the_batch(vae, image_vae, video):
    """Image latents of the last frames, decoded beside the video's; the loss is the mean of both halves'."""
    clip = video(2, 9, 16, 16)
    settings = Regularization(lambda_decoder=0.0, lambda_encoder=1.0)
    forward = forward_pass(vae, clip, settings, image_vae=image_vae, draw=DiagonalGaussian.mode)
    assert forward.decoder_side is forward.encoder_side is None
    assert torch.equal(forward.video_BCTHW, torch.cat([clip, clip]))
    image_posterior = encode_images(image_vae, clip[:, :, ::4])
    assert torch.equal(forward.posterior.mean[2:], image_posterior.mean)
    assert torch.equal(forward.posterior.logvar[2:], image_posterior.logvar)
    torch.testing.assert_close(forward.reconstruction_BCTHW[2:], vae.decode(image_posterior.mean), rtol=0, atol=1e-5)
    loss, metrics = loss_of(forward, settings)
    first, second = ((clip - half).abs().sum() / 18 for half in forward.reconstruction_BCTHW.split(2))
    assert metrics["reconstruction"] == pytest.approx((first + second).item() / 2, rel=1e-5)
    loss.backward()
    assert all(parameter.grad is None for parameter in image_vae.parameters())


def test_both_sides_in_the_codes_form(vae, image_vae, video):
    settings = Regularization(lambda_encoder=1.0)
    forward = forward_pass(vae, video(1, 5, 16, 16), settings, image_vae=image_vae)
    assert forward.reconstruction_BCTHW.shape == (2, 3, 5, 16, 16)
    assert forward.decoder_side.prediction.shape == (1, 3, 2, 16, 16)


def test_without_regularization_there_is_no_need_of_an_image_vae(vae, video):
    settings = Regularization(lambda_decoder=0.0)
    forward = forward_pass(vae, video(1, 5, 16, 16), settings)
    assert forward.decoder_side is forward.encoder_side is None
    assert not settings.needs_image_vae
    with pytest.raises(ValueError, match="image_vae: expected one"):
        forward_pass(vae, video(1, 5, 16, 16), Regularization())


# --- gradients -----------------------------------------------------------------------------------------------------


def gradient_sums(module) -> dict[str, float | None]:
    return {
        name: None if parameter.grad is None else parameter.grad.abs().sum().item()
        for name, parameter in module.named_parameters()
    }


def test_the_decoder_side_reaches_every_encoder_weight_and_nothing_else(vae, image_vae, video):
    before = copy.deepcopy(image_vae.state_dict())
    generator = torch.Generator().manual_seed(3)
    settings = Regularization()
    forward = forward_pass(vae, video(2, 9, 16, 16), settings, image_vae=image_vae, mapping_generator=generator)
    target, prediction = forward.decoder_side
    (target - prediction).abs().sum().backward()
    reached = gradient_sums(vae.encoder)
    del reached["mid.attn_1.k.bias"]  # which a softmax cancels
    assert all(total is not None and total > 0 for total in reached.values())
    assert all(total is None for total in gradient_sums(vae.decoder).values())
    assert all(total is None for total in gradient_sums(image_vae).values())
    assert all(torch.equal(before[key], value) for key, value in image_vae.state_dict().items())


def test_the_encoder_side_reaches_the_video_decoder_alone(vae, image_vae, video):
    forward = forward_pass(vae, video(1, 5, 16, 16), EQUATIONS, image_vae=image_vae)
    target, prediction = forward.encoder_side
    (target - prediction).abs().sum().backward()
    assert all(total is not None for total in gradient_sums(vae.decoder).values())
    assert all(total is None for total in gradient_sums(vae.encoder).values())
    assert all(total is None for total in gradient_sums(image_vae).values())


def test_steps_on_the_decoder_side_make_the_image_decoder_read_the_latents(vae, image_vae):
    """What the regularization is for: D_i(E_v(X)) comes nearer to psi(X) though D_i stands still."""
    model = copy.deepcopy(vae)
    settings = Regularization(mapping="slice")
    expressive = copy.deepcopy(image_vae)
    with torch.no_grad():  # a decoder whose pictures depend on its latents, and a clip that it can show
        for parameter in expressive.decoder.parameters():
            parameter.mul_(3 if parameter.ndim == 4 else 1)
        frame = expressive.decode(3 * torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(4)))
    clip = frame.unsqueeze(2).expand(-1, -1, 5, -1, -1)
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=5e-3)
    errors = []
    for _ in range(12):
        forward = forward_pass(model, clip, settings, image_vae=expressive, draw=DiagonalGaussian.mode)
        target, prediction = forward.decoder_side
        error = (target - prediction).abs().mean()
        errors.append(error.item())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert errors[-1] < 0.6 * errors[0]


def test_an_image_vae_that_would_be_trained_is_refused(video):
    image_vae = ImageVAE(in_channels=3, latent_channels=4, widths=(32, 32))
    latent = torch.zeros(1, 4, 2, 4, 4)
    with pytest.raises(ValueError, match=r"expected frozen weights, got 152 that require gradients, such as 'enc"):
        decode_images(image_vae, latent)
    with torch.no_grad():
        assert decode_images(image_vae, latent).shape == (1, 3, 2, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mapping": "last"}, r"mapping: expected one of \('first', 'slice', 'average', 'random'\), got 'last'"),
        ({"form": "paper"}, r"form: expected one of \('code', 'equations'\), got 'paper'"),
        ({"lambda_decoder": -1.0}, "lambda_decoder: expected a number >= 0, got -1"),
        ({"lambda_encoder": 0.5}, "lambda_encoder: expected 0 or 1 with form='code'"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ValueError, match=f"Regularization: {message}"):
        Regularization(**change)
