"""The losses that train a video VAE: CV-VAE's (arXiv 2405.20279, section 3.1, and its code) and IV-VAE's.

With e the error of a value (absolute in the code, squared in the paper's equations) plus `perceptual` times the
frame's LPIPS, and v a log variance that is learned or fixed at 0,

    reconstruction = sum(e / exp(v) + v) / (B T)          over all values of all frames
    decoder side   = the same of the pixel error alone, with a log variance of its own
    KL             = sum over a clip's latent, mean over clips
    generator      = reconstruction + lambda_1 decoder side + lambda_2 encoder side + kl KL + w g

where g = -mean(D(reconstruction)) and w keeps the GAN's gradient at the decoder's last layer at `adversarial` times
that of the other terms. The discriminator's loss is the hinge of section 3.1's adversarial term as the code has it.
Everything is a function of tensors and modules; the only state is the two log variances.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from cvvae.layers import frames_to_batch
from cvvae.posterior import DiagonalGaussian
from cvvae.regularization import Comparison, Regularization

PerceptualDistance = Callable[[Tensor, Tensor], Tensor]
"""(frames_NCHW, frames_NCHW) in [-1, 1] -> (N,) distances, such as `cvvae.lpips.LPIPS`."""
Metrics = dict[str, float]

LARGEST_ADVERSARIAL_WEIGHT = 1e4
_GRADIENT_EPSILON = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the terms; the defaults are those of CV-VAE's published SD3 recipe. ValueError on a negative one."""

    pixel_error: Literal["absolute", "squared"] = "absolute"
    log_variance: Literal["learned", "fixed"] = "learned"
    perceptual: float = 0.5
    kl: float = 1.0
    """The published recipe sums the KL over a latent of thousands of values. LDM's was 1e-6."""
    adversarial: float = 0.5
    """0: no GAN."""
    adversarial_start: int = 1
    """The first step with a GAN; before it both its losses are 0."""

    def __post_init__(self) -> None:
        for field, choices in (("pixel_error", ("absolute", "squared")), ("log_variance", ("learned", "fixed"))):
            if getattr(self, field) not in choices:
                raise ValueError(f"LossWeights: {field}: expected one of {choices}, got {getattr(self, field)!r}")
        for field in ("perceptual", "kl", "adversarial", "adversarial_start"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"LossWeights: {field}: expected a number >= 0, got {getattr(self, field)}")

    def has_gan(self, step: int) -> bool:
        """Whether the adversarial terms count at this step."""
        return self.adversarial > 0 and step >= self.adversarial_start


LOSS_WEIGHTS: dict[str, LossWeights] = {
    "cv-vae": LossWeights(),
    "cv-vae-equations": LossWeights(pixel_error="squared", log_variance="fixed"),
    "iv-vae": LossWeights(log_variance="fixed", perceptual=1.0, kl=1e-6, adversarial=0.0),
    "iv-vae-last-stage": LossWeights(log_variance="fixed", perceptual=1.0, kl=1e-6, adversarial=0.5),
}
"""Recipes. IV-VAE (arXiv 2411.06449) trains with MAE, LPIPS and KL, and with a GAN in its last stage only; its
weights were not at hand, so these are LDM's."""


def _unchanged(gradient: Tensor) -> Tensor:
    return gradient


class VAELoss(nn.Module):
    """Both players' losses. Its parameters, the log variances, belong to the generator's optimizer."""

    def __init__(self, weights: LossWeights, regularization: Regularization) -> None:
        super().__init__()
        self.weights = weights
        self.regularization = regularization
        is_learned = weights.log_variance == "learned"
        self.logvar = nn.Parameter(torch.zeros(()), requires_grad=is_learned)
        self.logvar_2d = nn.Parameter(torch.zeros(()), requires_grad=is_learned)

    def generator_loss(
        self,
        video_BCTHW: Tensor,
        posterior: DiagonalGaussian,
        reconstruction_BCTHW: Tensor,
        *,
        step: int,
        decoder_side: Comparison | None = None,
        encoder_side: Comparison | None = None,
        perceptual: PerceptualDistance | None = None,
        discriminator: nn.Module | None = None,
        last_layer: Tensor | None = None,
        mean_over_workers: Callable[[Tensor], Tensor] = _unchanged,
    ) -> tuple[Tensor, Metrics]:
        """The loss to minimise over the VAE and this module, a scalar with gradients, and its terms as floats.

        `perceptual`: None for the pixel error alone. `discriminator` and `last_layer` (a weight the reconstruction
        depends on, best that of the decoder's last convolution) are needed once the GAN counts.
        `mean_over_workers` averages a gradient over all workers, so that the GAN's weight is that of the whole batch.
        ValueError if shapes differ or the GAN counts and one of its two arguments is missing.
        """
        terms = {"reconstruction": self._reconstruction(video_BCTHW, reconstruction_BCTHW, perceptual)}
        loss = terms["reconstruction"]
        if decoder_side is not None:
            terms["decoder_side"] = self._per_frame_sum(self._pixel_error(*decoder_side), self.logvar_2d)
            loss = loss + self.regularization.lambda_decoder * terms["decoder_side"]
        if encoder_side is not None:
            terms["encoder_side"] = self._per_frame_sum(self._pixel_error(*encoder_side), self.logvar)
            loss = loss + self.regularization.lambda_encoder * terms["encoder_side"]
        judged = loss
        terms["kl"] = posterior.kl().float().mean()
        loss = loss + self.weights.kl * terms["kl"]
        if self.weights.has_gan(step):
            if discriminator is None or last_layer is None:
                raise ValueError(
                    f"step {step}: expected a discriminator and the decoder's last layer, since the GAN counts from "
                    f"step {self.weights.adversarial_start}; got {discriminator!r:.40} and {last_layer!r:.40}"
                )
            terms["adversarial"] = -discriminator(reconstruction_BCTHW).float().mean()
            weight = self.weights.adversarial * adaptive_weight(
                judged, terms["adversarial"], last_layer, mean_over_workers=mean_over_workers
            )
            terms["adversarial_weight"] = weight
            loss = loss + weight * terms["adversarial"]
        terms["l1"] = (video_BCTHW - reconstruction_BCTHW).detach().float().abs().mean()
        terms["logvar"], terms["logvar_2d"] = self.logvar, self.logvar_2d
        return loss, _as_floats({"loss": loss, **terms})

    def discriminator_loss(
        self, video_BCTHW: Tensor, reconstruction_BCTHW: Tensor, *, step: int, discriminator: nn.Module
    ) -> tuple[Tensor, Metrics]:
        """The hinge loss to minimise over the discriminator, a scalar; no gradient reaches the reconstruction.

        0 (with gradients of 0) before the GAN starts. Metrics: the loss and the mean logits.
        """
        real = discriminator(video_BCTHW.detach()).float()
        fake = discriminator(reconstruction_BCTHW.detach()).float()
        loss = hinge_loss(real, fake) * float(self.weights.has_gan(step))
        return loss, _as_floats({"discriminator_loss": loss, "real": real.mean(), "fake": fake.mean()})

    # --- terms -------------------------------------------------------------------------------------------------

    def _reconstruction(
        self, video_BCTHW: Tensor, reconstruction_BCTHW: Tensor, perceptual: PerceptualDistance | None
    ) -> Tensor:
        error_BCTHW = self._pixel_error(video_BCTHW, reconstruction_BCTHW)
        if perceptual is not None and self.weights.perceptual:
            distances = perceptual(frames_to_batch(reconstruction_BCTHW), frames_to_batch(video_BCTHW)).float()
            distances_B1T11 = distances.view(len(video_BCTHW), 1, -1, 1, 1)
            # each frame's distance counts at each of its values, as LDM's broadcast does
            error_BCTHW = error_BCTHW + self.weights.perceptual * distances_B1T11
        return self._per_frame_sum(error_BCTHW, self.logvar)

    def _pixel_error(self, target: Tensor, prediction: Tensor) -> Tensor:
        if target.shape != prediction.shape:
            raise ValueError(
                f"loss: expected a prediction of the target's shape {tuple(target.shape)}, "
                f"got {tuple(prediction.shape)}"
            )
        difference = target.float() - prediction.float()
        return difference.abs() if self.weights.pixel_error == "absolute" else difference.square()

    @staticmethod
    def _per_frame_sum(error_BCTHW: Tensor, logvar: Tensor) -> Tensor:
        """sum(e / exp(v) + v) / (B T): nats of a Laplace (or normal) likelihood per frame, up to a constant."""
        num_frames = error_BCTHW.shape[0] * error_BCTHW.shape[2]
        return (error_BCTHW * torch.exp(-logvar) + logvar).sum() / num_frames


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """(mean(relu(1 - real)) + mean(relu(1 + fake))) / 2 of logits of any shape."""
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def adaptive_weight(
    judged: Tensor,
    adversarial: Tensor,
    last_layer: Tensor,
    *,
    mean_over_workers: Callable[[Tensor], Tensor] = _unchanged,
) -> Tensor:
    """The quotient of two gradients' norms at the last layer, judged over adversarial + 1e-4, at most 1e4; detached.

    From VQGAN (arXiv 2012.09841, section 3.1). 0 where gradients are off, as in an evaluation.
    """
    if not torch.is_grad_enabled():
        return torch.zeros((), device=judged.device)
    norms = [
        mean_over_workers(torch.autograd.grad(term, last_layer, retain_graph=True)[0].detach()).float().norm()
        for term in (judged, adversarial)
    ]
    return (norms[0] / (norms[1] + _GRADIENT_EPSILON)).clamp(0.0, LARGEST_ADVERSARIAL_WEIGHT).detach()


def _as_floats(terms: dict[str, Tensor]) -> Metrics:
    """One transfer from the device, whatever the number of terms."""
    values = torch.stack([term.detach().float() for term in terms.values()]).tolist()
    return dict(zip(terms, values, strict=True))
