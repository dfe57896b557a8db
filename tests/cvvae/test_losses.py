"""The losses of training against values computed by hand."""

import math

import pytest
import torch
from torch import nn

from cvvae import DiagonalGaussian
from cvvae.discriminator import PatchDiscriminator3d
from cvvae.losses import LOSS_WEIGHTS, LossWeights, VAELoss, adaptive_weight, hinge_loss
from cvvae.regularization import Comparison, Regularization

NO_GAN = LossWeights(adversarial=0)
VALUES_PER_FRAME = 3 * 4 * 2
ZEROS = torch.zeros(2, 3, 5, 4, 2)


def posterior(mean: float = 0.0, logvar: float = 0.0) -> DiagonalGaussian:
    shape = (2, 4, 2, 1, 1)
    return DiagonalGaussian(torch.full(shape, mean), torch.full(shape, logvar))


def generator_loss(reconstruction, *, weights=NO_GAN, regularization=None, logvar=0.0, logvar_2d=0.0, **more):
    module = VAELoss(weights, regularization or Regularization())
    with torch.no_grad():
        module.logvar.fill_(logvar)
        module.logvar_2d.fill_(logvar_2d)
    latent = more.pop("posterior", posterior())
    return module.generator_loss(more.pop("video", ZEROS), latent, reconstruction, step=more.pop("step", 1), **more)


def test_the_absolute_error_is_summed_over_a_frame_and_averaged_over_frames():
    loss, metrics = generator_loss(ZEROS + 0.5)
    assert loss.item() == pytest.approx(0.5 * VALUES_PER_FRAME)
    assert metrics["l1"] == pytest.approx(0.5)
    assert metrics["loss"] == metrics["reconstruction"] == pytest.approx(loss.item())
    one_frame_off = ZEROS.clone()
    one_frame_off[1, :, 3] = -2.0
    assert generator_loss(one_frame_off)[0].item() == pytest.approx(2.0 * VALUES_PER_FRAME / 10)


def test_the_squared_error_of_the_equations():
    weights = LossWeights(pixel_error="squared", adversarial=0)
    assert generator_loss(ZEROS + 0.5, weights=weights)[0].item() == pytest.approx(0.25 * VALUES_PER_FRAME)


def test_the_log_variance_divides_the_error_and_adds_itself():
    loss, metrics = generator_loss(ZEROS + 0.5, logvar=math.log(4))
    assert loss.item() == pytest.approx((0.5 / 4 + math.log(4)) * VALUES_PER_FRAME)
    assert metrics["logvar"] == pytest.approx(math.log(4))


def test_the_learned_log_variance_settles_at_the_mean_error():
    """d/dv (e exp(-v) + v) = 0 at exp(v) = e; a fixed one gets no gradient."""
    module = VAELoss(NO_GAN, Regularization())
    optimizer = torch.optim.SGD(module.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        module.generator_loss(ZEROS, posterior(), ZEROS + 0.5, step=1)[0].backward()
        optimizer.step()
    assert module.logvar.exp().item() == pytest.approx(0.5, rel=1e-3)
    assert module.logvar_2d.item() == 0
    fixed = VAELoss(LossWeights(log_variance="fixed"), Regularization())
    assert not any(parameter.requires_grad for parameter in fixed.parameters())


def test_the_perceptual_distance_counts_at_every_value_of_its_frame():
    """Frames reach it folded clip by clip, the reconstruction first."""
    seen = {}

    def distance(got_NCHW, expected_NCHW):
        seen["got"], seen["expected"] = got_NCHW, expected_NCHW
        return torch.arange(10.0)

    weights = LossWeights(perceptual=0.5, adversarial=0)
    loss, _ = generator_loss(ZEROS + 0.5, weights=weights, perceptual=distance)
    assert loss.item() == pytest.approx((0.5 + 0.5 * 4.5) * VALUES_PER_FRAME)
    assert seen["got"].shape == seen["expected"].shape == (10, 3, 4, 2)
    assert seen["got"].mean() == 0.5
    without = LossWeights(perceptual=0, adversarial=0)
    assert generator_loss(ZEROS + 0.5, weights=without, perceptual=distance)[0].item() == pytest.approx(12)


def test_each_frames_distance_is_its_own():
    video = torch.arange(10.0).view(2, 1, 5, 1, 1).expand(2, 3, 5, 4, 2)
    order = []
    generator_loss(video, video=video, perceptual=lambda a, b: order.append(b[:, 0, 0, 0]) or torch.zeros(10))
    assert torch.equal(order[0], torch.arange(10.0))


def test_the_kl_is_summed_over_a_latent_and_averaged_over_clips():
    weights = LossWeights(kl=0.25, adversarial=0)
    loss, metrics = generator_loss(ZEROS, weights=weights, posterior=posterior(mean=2.0, logvar=math.log(3)))
    per_value = 0.5 * (4 + 3 - 1 - math.log(3))
    assert metrics["kl"] == pytest.approx(8 * per_value)
    assert loss.item() == pytest.approx(0.25 * 8 * per_value)


def test_the_decoder_side_has_its_own_log_variance_and_lambda():
    regularization = Regularization(lambda_decoder=2.0)
    target = torch.zeros(2, 3, 2, 4, 2)
    loss, metrics = generator_loss(
        ZEROS + 0.5,
        regularization=regularization,
        logvar=1.0,
        logvar_2d=math.log(2),
        decoder_side=Comparison(target, target - 0.3),
        perceptual=lambda got, expected: torch.zeros(len(got)),
    )
    decoder_side = (0.3 / 2 + math.log(2)) * VALUES_PER_FRAME
    assert metrics["decoder_side"] == pytest.approx(decoder_side)
    assert loss.item() == pytest.approx((0.5 / math.e + 1) * VALUES_PER_FRAME + 2 * decoder_side)


def test_equation_3_sums_both_sides():
    regularization = Regularization(lambda_decoder=0.5, lambda_encoder=3.0, form="equations")
    loss, metrics = generator_loss(
        ZEROS + 1.0,
        weights=LossWeights(pixel_error="squared", log_variance="fixed", adversarial=0),
        regularization=regularization,
        decoder_side=Comparison(ZEROS[:, :, :2], ZEROS[:, :, :2] + 2.0),
        encoder_side=Comparison(ZEROS, ZEROS + 3.0),
    )
    assert metrics["encoder_side"] == pytest.approx(9 * VALUES_PER_FRAME)
    assert loss.item() == pytest.approx((1 + 0.5 * 4 + 3 * 9) * VALUES_PER_FRAME)


# --- GAN -----------------------------------------------------------------------------------------------------------


class MeanOf(nn.Module):
    """A discriminator whose logit is the mean of a clip, so that gradients are known."""

    def forward(self, video_BCTHW):
        return video_BCTHW.mean(dim=(1, 2, 3, 4))


def scaled(scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A "last layer" and the reconstruction that it scales: 0.5 everywhere at a scale of 1."""
    last_layer = torch.tensor([scale], requires_grad=True)
    return last_layer, (ZEROS + 0.5) * last_layer


def test_the_adversarial_weight_is_the_quotient_of_gradients():
    """d sum|w x| / (B T) / dw = 12; d -mean(w x) / dw = -0.5."""
    last_layer, reconstruction = scaled(1.0)
    weights = LossWeights(adversarial=0.5, kl=0)
    loss, metrics = generator_loss(
        reconstruction, weights=weights, discriminator=MeanOf(), last_layer=last_layer, step=7
    )
    expected = 0.5 * 12 / (0.5 + 1e-4)
    assert metrics["adversarial"] == pytest.approx(-0.5)
    assert metrics["adversarial_weight"] == pytest.approx(expected)
    assert loss.item() == pytest.approx(12 - 0.5 * expected)
    loss.backward()
    assert last_layer.grad is not None
    assert last_layer.grad.item() == pytest.approx(12 - 0.5 * expected)


def test_the_adversarial_weight_is_bounded_and_0_without_gradients():
    last_layer = torch.ones(1, requires_grad=True)
    assert adaptive_weight(1e9 * last_layer.sum(), last_layer.sum(), last_layer).item() == 1e4
    with torch.no_grad():
        assert adaptive_weight(torch.ones(()), torch.ones(()), last_layer).item() == 0


def test_the_gan_starts_at_its_step():
    weights = LossWeights(adversarial=0.5, adversarial_start=10)
    last_layer, reconstruction = scaled(1.0)
    for step, counts in ((9, False), (10, True)):
        _, metrics = generator_loss(
            reconstruction, weights=weights, discriminator=MeanOf(), last_layer=last_layer, step=step
        )
        assert ("adversarial" in metrics) is counts
    with pytest.raises(ValueError, match="step 10: expected a discriminator and the decoder's last layer"):
        generator_loss(reconstruction, weights=weights, step=10)
    module = VAELoss(weights, Regularization())
    assert module.discriminator_loss(ZEROS, ZEROS, step=9, discriminator=MeanOf())[0].item() == 0
    assert module.discriminator_loss(ZEROS, ZEROS, step=10, discriminator=MeanOf())[0].item() == 1


def test_the_hinge_loss():
    assert hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 1.0])).item() == pytest.approx(0.5 * (0.25 + 1.0))


def test_the_discriminators_loss_reaches_the_discriminator_alone():
    discriminator = PatchDiscriminator3d(width=32)
    video = torch.randn(1, 3, 5, 16, 16)
    reconstruction = torch.randn(1, 3, 5, 16, 16, requires_grad=True)
    loss, metrics = VAELoss(LossWeights(), Regularization()).discriminator_loss(
        video, reconstruction, step=1, discriminator=discriminator
    )
    loss.backward()
    assert reconstruction.grad is None
    assert all(p.grad is not None for p in discriminator.parameters() if p.requires_grad)
    with torch.no_grad():
        real, fake = discriminator(video), discriminator(reconstruction)
    assert loss.item() == pytest.approx(0.5 * (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()).item())
    assert metrics["real"] == pytest.approx(real.mean().item(), abs=1e-5)
    assert metrics["fake"] == pytest.approx(fake.mean().item(), abs=1e-5)


def test_two_workers_weigh_the_gan_as_one_would():
    """Losses average over workers, and so do gradients at the last layer before their norms are taken."""
    torch.manual_seed(0)
    video, features = torch.randn(2, 3, 5, 4, 2), torch.randn(2, 3, 5, 4, 2)
    kernel = torch.randn(3, 3, requires_grad=True)

    class Squash(nn.Module):
        def forward(self, x):
            return torch.tanh(3 * x).mean(dim=(2, 3, 4))

    def run(clips: slice, mean_over_workers):
        reconstruction = torch.einsum("oc,bcthw->bothw", kernel, features[clips])
        return generator_loss(
            reconstruction,
            video=video[clips],
            weights=LossWeights(),
            posterior=posterior(),
            discriminator=Squash(),
            last_layer=kernel,
            mean_over_workers=mean_over_workers,
        )

    whole, metrics = run(slice(0, 2), lambda gradient: gradient)
    seen: list[list[torch.Tensor]] = [[], []]
    for worker in range(2):
        run(slice(worker, worker + 1), lambda gradient, worker=worker: seen[worker].append(gradient) or gradient)
    means = [(first + second) / 2 for first, second in zip(*seen, strict=True)]
    lefts = [iter(means), iter(means)]
    halves = [run(slice(k, k + 1), lambda gradient, left=left: next(left)) for k, left in enumerate(lefts)]
    for _, half in halves:
        assert half["adversarial_weight"] == pytest.approx(metrics["adversarial_weight"], rel=1e-5)
    assert (halves[0][0] + halves[1][0]).item() / 2 == pytest.approx(whole.item(), rel=1e-5)


# --- bad input -----------------------------------------------------------------------------------------------------


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r"target's shape \(2, 3, 5, 4, 2\), got \(2, 3, 4, 4, 2\)"):
        generator_loss(ZEROS[:, :, :4])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": -1}, "LossWeights: kl: expected a number >= 0, got -1"),
        ({"adversarial": float("nan")}, "adversarial: expected a number >= 0, got nan"),
        ({"pixel_error": "huber"}, r"pixel_error: expected one of \('absolute', 'squared'\), got 'huber'"),
        ({"log_variance": "none"}, "log_variance: expected one of"),
    ],
)
def test_weights_that_cannot_be_meant_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        LossWeights(**change)


def test_recipes_are_the_published_ones():
    published = LOSS_WEIGHTS["cv-vae"]
    assert (published.perceptual, published.kl, published.adversarial) == (0.5, 1.0, 0.5)
    assert published.has_gan(1)
    assert not published.has_gan(0)
    assert not LOSS_WEIGHTS["iv-vae"].has_gan(10**6)
    assert LOSS_WEIGHTS["iv-vae-last-stage"].has_gan(1)
