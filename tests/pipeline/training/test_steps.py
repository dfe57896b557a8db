"""One step of either player: what the discriminator is shown."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from cvvae import seeded_vae
from cvvae.cv_vae import CVVAE_SPECS
from cvvae.image_vae import ImageVAE
from cvvae.losses import LossWeights, VAELoss
from cvvae.regularization import Regularization
from pipeline.training.batches import Batch, to_video
from pipeline.training.steps import Players, Precision, Stepper
from pipeline.training.workers import Workers

SPEC = replace(CVVAE_SPECS["cvvae-sd21-tiny"], widths=(32, 32, 32, 32))


class Watched(nn.Module):
    """A discriminator of one weight that keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.shown: list[Tensor] = []

    def forward(self, video_BCTHW: Tensor) -> Tensor:
        self.shown.append(video_BCTHW.detach())
        return self.weight * video_BCTHW.mean(dim=(1, 2, 3, 4))


def stepper(settings: Regularization) -> tuple[Stepper, Watched]:
    """Of a run whose rates are 0, so that a later step meets the same weights."""
    torch.manual_seed(1)
    image_vae = ImageVAE(in_channels=3, latent_channels=4, widths=SPEC.widths).requires_grad_(False)
    model, watched = seeded_vae(SPEC, seed=2).train(), Watched()
    loss = VAELoss(LossWeights(perceptual=0), settings)
    (last_layer,) = [weight for name, weight in model.named_parameters() if name == "decoder.conv_out.weight"]
    players = Players(model, loss, last_layer, discriminator=watched, image_vae=image_vae)
    optimizers = (torch.optim.SGD(players.generator_parameters(), lr=0.0), torch.optim.SGD([watched.weight], lr=0.0))
    precision = Precision("float32", torch.device("cpu"))
    made = Stepper(players, Workers(), *optimizers, precision=precision, seed=5, micro_batch=1, clip_norm=None)
    return made, watched


@pytest.mark.parametrize(("lambda_encoder", "sides"), [(0.0, 1), (1.0, 2)])
def test_the_discriminator_judges_all_that_was_reconstructed(lambda_encoder: float, sides: int) -> None:
    """Image latents decoded beside the clips' own count, and the same whether or not a generator step came before."""
    steps, watched = stepper(Regularization(lambda_encoder=lambda_encoder))
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 16, 16, 3), dtype=np.uint8)
    batch = Batch(step=3, source="clips", frames_NTHWC=frames, numbers=(0, 1), keys=("a", "b"), positions={})
    _, reconstructions = steps.generator_step(batch)
    assert [len(each) for each in reconstructions] == [sides, sides]

    watched.shown.clear()
    steps.discriminator_step(batch, reconstructions)
    with_generator = list(watched.shown)
    watched.shown.clear()
    steps.discriminator_step(batch)
    video_BCTHW = to_video(frames)
    for (real, fake), (real_again, fake_again), clip in zip(
        _pairs(with_generator), _pairs(watched.shown), video_BCTHW.split(1), strict=True
    ):
        assert torch.equal(real, clip.repeat(sides, 1, 1, 1, 1))
        assert torch.equal(real_again, real)
        torch.testing.assert_close(fake_again, fake, rtol=0, atol=1e-4)  # without gradients convolutions differ
        assert len(fake) == sides


def _pairs(shown: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """(real, reconstructed) of each micro-batch."""
    return list(zip(shown[::2], shown[1::2], strict=True))
