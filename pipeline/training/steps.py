"""One step of either player: forward and backward over micro-batches, averaged over workers, clipped, applied.

Noise is drawn per sample from (seed, step, number of the sample), the frames of the regularization from (seed, step):
a step is the same however its batch is split, and needs no generator's state to be resumed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from cvvae import DiagonalGaussian, VideoVAE
from cvvae.image_vae import ImageVAE
from cvvae.losses import PerceptualDistance, VAELoss
from cvvae.regularization import Forward, forward_pass, reconstruct
from pipeline.errors import ConfigError
from pipeline.formats.tensors import TORCH_DTYPES
from pipeline.policies import DTypeName
from pipeline.training.batches import Batch, to_video
from pipeline.training.workers import Workers

Figures = dict[str, float]


@dataclass(slots=True)
class Players:
    """What is trained, and what judges it."""

    model: VideoVAE
    loss: VAELoss
    last_layer: Tensor
    """The weight of the decoder's last convolution."""
    discriminator: nn.Module | None = None
    image_vae: ImageVAE | None = None
    perceptual: PerceptualDistance | None = None

    def generator_parameters(self) -> list[nn.Parameter]:
        return [*self.model.parameters(), *self.loss.parameters()]


class Precision:
    """Autocast, and the loss scaling that float16 needs."""

    def __init__(self, name: DTypeName, device: torch.device) -> None:
        """ConfigError for half precision on a CPU."""
        if name != "float32" and device.type == "cpu":
            # weight gradients of small bf16 convolutions then held uninitialised memory, run by run another value,
            # sometimes finite and 1e35 (torch 2.13.0, AVX512 with bf16, 2 x 2 positions)
            raise ConfigError(
                f"loop.precision: expected float32 on a CPU, got {name}: its gradients are not right there"
            )
        self._device, self._dtype = device.type, TORCH_DTYPES[name]
        self.scaled = name == "float16"

    def autocast(self) -> torch.autocast:
        """A new context; it does nothing for float32."""
        return torch.autocast(self._device, dtype=self._dtype, enabled=self._dtype is not torch.float32)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self._device, enabled=self.scaled)


class _Float32Ends:
    """A VAE under autocast whose posterior and pixels are float32: KL and errors are sums of thousands of values."""

    def __init__(self, model: VideoVAE) -> None:
        self._model = model
        self.spec = model.spec

    def encode(self, video_BCTHW: Tensor) -> DiagonalGaussian:
        posterior = self._model.encode(video_BCTHW)
        return DiagonalGaussian(posterior.mean.float(), posterior.logvar.float())

    def decode(self, latent_BCTHW: Tensor) -> Tensor:
        return self._model.decode(latent_BCTHW.float()).float()


class Stepper:
    """Applies steps to the players. Its optimizers' rates are set by the caller."""

    def __init__(
        self,
        players: Players,
        workers: Workers,
        generator: torch.optim.Optimizer,
        discriminator: torch.optim.Optimizer | None,
        *,
        precision: Precision,
        seed: int,
        micro_batch: int | None,
        clip_norm: float | None,
    ) -> None:
        self.players, self.workers, self.precision = players, workers, precision
        self.optimizers = {"generator": generator, **({"discriminator": discriminator} if discriminator else {})}
        self.scalers = {name: precision.scaler() for name in self.optimizers}
        self._seed, self._micro_batch, self._clip_norm = seed, micro_batch, clip_norm
        self._vae = cast(VideoVAE, _Float32Ends(players.model))
        judge = players.discriminator
        self._judge_weights = [weight for weight in judge.parameters() if weight.requires_grad] if judge else []

    def generator_step(self, batch: Batch) -> tuple[Figures, list[Tensor]]:
        """Train the VAE on this batch. Its figures, and the reconstructions of the micro-batches, detached."""
        players = self.players
        self._zero("generator")
        for weight in self._judge_weights:  # it judges, and does not learn from that
            weight.requires_grad_(False)
        figures: Figures = {}
        reconstructions: list[Tensor] = []
        for video_BCTHW, numbers in self._micro_batches(batch):
            share = len(numbers) / len(batch.numbers)
            with self.precision.autocast():
                result = self._forward(video_BCTHW, numbers, batch.step)
                loss, terms = players.loss.generator_loss(
                    result.video_BCTHW,
                    result.posterior,
                    result.reconstruction_BCTHW,
                    step=batch.step,
                    decoder_side=result.decoder_side,
                    encoder_side=result.encoder_side,
                    perceptual=players.perceptual,
                    discriminator=players.discriminator,
                    last_layer=players.last_layer,
                    mean_over_workers=self.workers.mean,
                )
            self.scalers["generator"].scale(loss * share).backward()
            _add(figures, terms, share)
            reconstructions.append(result.reconstruction_BCTHW.detach())
        figures["gradient_norm"] = self._apply("generator", players.generator_parameters())
        for weight in self._judge_weights:
            weight.requires_grad_(True)
        return figures, reconstructions

    def discriminator_step(self, batch: Batch, reconstructions: Sequence[Tensor] | None = None) -> Figures:
        """Train the discriminator on this batch; `reconstructions` are the generator step's, if there was one."""
        discriminator = self.players.discriminator
        assert discriminator is not None, "only runs with a GAN come here"
        self._zero("discriminator")
        figures: Figures = {}
        for place, (video_BCTHW, numbers) in enumerate(self._micro_batches(batch)):
            share = len(numbers) / len(batch.numbers)
            with self.precision.autocast():
                if reconstructions is None:
                    fake_BCTHW = self._reconstructed(video_BCTHW, numbers, batch.step)
                else:
                    fake_BCTHW = reconstructions[place]
                sides = len(fake_BCTHW) // len(video_BCTHW)  # 2 if image latents were decoded beside the clips' own
                loss, terms = self.players.loss.discriminator_loss(
                    video_BCTHW.repeat(sides, 1, 1, 1, 1), fake_BCTHW, step=batch.step, discriminator=discriminator
                )
            self.scalers["discriminator"].scale(loss * share).backward()
            _add(figures, terms, share)
        norm = self._apply("discriminator", self._judge_weights)
        return {**figures, "discriminator_gradient_norm": norm}

    def _forward(self, video_BCTHW: Tensor, numbers: Sequence[int], step: int) -> Forward:
        frames = torch.Generator().manual_seed(seed_of(self._seed, "mapping", step))
        return forward_pass(
            self._vae,
            video_BCTHW,
            self.players.loss.regularization,
            image_vae=self.players.image_vae,
            mapping_generator=frames,
            draw=lambda posterior: self._draw(posterior, numbers, step),
        )

    @torch.no_grad()
    def _reconstructed(self, video_BCTHW: Tensor, numbers: Sequence[int], step: int) -> Tensor:
        made = reconstruct(
            self._vae,
            video_BCTHW,
            self.players.loss.regularization,
            image_vae=self.players.image_vae,
            draw=lambda posterior: self._draw(posterior, numbers, step),
        )
        return made.video_BCTHW

    def _draw(self, posterior: DiagonalGaussian, numbers: Sequence[int], step: int) -> Tensor:
        """A sample of each; image latents appended to the batch (the regularization's encoder side) come after."""
        shape = posterior.mean.shape[1:]
        sides = len(posterior.mean) // len(numbers)
        noise = [
            torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(self._seed, f"noise{side}", step, k)))
            for side in range(sides)
            for k in numbers
        ]
        noise_BCTHW = torch.stack(noise).to(posterior.mean)
        return posterior.mean + (0.5 * posterior.logvar).exp() * noise_BCTHW

    def _micro_batches(self, batch: Batch) -> list[tuple[Tensor, Sequence[int]]]:
        size = self._micro_batch or len(batch.numbers)
        return [
            (to_video(batch.frames_NTHWC[at : at + size], self.workers.device), batch.numbers[at : at + size])
            for at in range(0, len(batch.numbers), size)
        ]

    def _zero(self, name: str) -> None:
        self.optimizers[name].zero_grad(set_to_none=True)

    def _apply(self, name: str, parameters: Sequence[nn.Parameter]) -> float:
        """Average the gradients over the workers, clip, take the step. The gradient's norm before clipping."""
        optimizer, scaler = self.optimizers[name], self.scalers[name]
        self.workers.average_gradients(parameters)
        scaler.unscale_(optimizer)
        limit = self._clip_norm if self._clip_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        scaler.step(optimizer)
        scaler.update()
        return float(norm)


def _add(figures: Figures, terms: Mapping[str, float], share: float) -> None:
    for name, value in terms.items():
        figures[name] = figures.get(name, 0.0) + share * value


def seed_of(*parts: object) -> int:
    """A 63-bit seed of these values."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
