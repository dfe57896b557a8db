"""CV-VAE's latent-space regularization (arXiv 2405.20279, section 3.1): a frozen image VAE as the judge.

With X a clip of 1 + s*k frames (s the time stride), psi a mapping to its 1 + k latent frames, E_v and D_v the video
VAE, E_i and D_i the frozen image VAE, the paper writes

    L_reg^en  = || X - D_v(E_i(psi(X))) ||^2                      (1)
    L_reg^dec = || psi(X) - D_i(E_v(X)) ||^2                      (2)
    L = L_AE + lambda_1 L_reg^dec + lambda_2 L_reg^en             (3)

and settles on lambda_1 = 1, lambda_2 = 0 and the random mapping (tables 6 and 7). The authors' code computes (2) with
the absolute error and a learnable log variance of its own, and instead of (1) appends the image latents to the batch:
`Regularization.form` says which of the two is meant. Nothing here divides by a scale: both VAEs speak raw latents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from cvvae.image_vae import ImageVAE
from cvvae.layers import batch_to_frames, frames_to_batch
from cvvae.posterior import DiagonalGaussian
from cvvae.spec import VAESpec
from cvvae.vae import VideoVAE

Mapping = Literal["first", "slice", "average", "random"]
Form = Literal["code", "equations"]
FrameChoice = tuple[tuple[int, ...], ...]
"""For each latent frame that is compared, the video frames whose mean stands for it."""
Draw = Callable[[DiagonalGaussian], Tensor]

MAPPINGS: tuple[Mapping, ...] = ("first", "slice", "average", "random")
FORMS: tuple[Form, ...] = ("code", "equations")


@dataclass(frozen=True, slots=True, kw_only=True)
class Regularization:
    """Which sides are regularized, how strongly, against which frames. ValueError on what cannot be meant."""

    lambda_decoder: float = 1.0
    """lambda_1 of equation (3). 0: no decoder side."""
    lambda_encoder: float = 0.0
    """lambda_2 of equation (3). 0: no encoder side."""
    mapping: Mapping = "random"
    form: Form = "code"
    """How the encoder side is computed. "equations": (1), with `mapping`. "code": image latents of the last frame of
    each group, sampled, decoded and judged in one batch with the video's, both halves with the same weight, so
    lambda_encoder is 0 or 1."""

    def __post_init__(self) -> None:
        for field, choices in (("mapping", MAPPINGS), ("form", FORMS)):
            if getattr(self, field) not in choices:
                raise ValueError(f"Regularization: {field}: expected one of {choices}, got {getattr(self, field)!r}")
        for field in ("lambda_decoder", "lambda_encoder"):
            if not getattr(self, field) >= 0:
                raise ValueError(f"Regularization: {field}: expected a number >= 0, got {getattr(self, field)}")
        if self.form == "code" and self.lambda_encoder not in (0, 1):
            raise ValueError(
                f"Regularization: lambda_encoder: expected 0 or 1 with form='code', which weights both halves of the "
                f"batch alike, got {self.lambda_encoder}; form='equations' takes any"
            )

    @property
    def needs_image_vae(self) -> bool:
        """Whether there is anything to regularize with."""
        return self.lambda_decoder > 0 or self.lambda_encoder > 0


class Comparison(NamedTuple):
    """What one side of the regularization compares; both (B, 3, T', H, W) in about [-1, 1]."""

    target: Tensor
    prediction: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Forward:
    """What the losses need of one pass. B counts image latents too if they were appended to the batch."""

    video_BCTHW: Tensor
    """What `reconstruction_BCTHW` should be."""
    posterior: DiagonalGaussian
    reconstruction_BCTHW: Tensor
    decoder_side: Comparison | None = None
    encoder_side: Comparison | None = None


# --- the mapping psi ---------------------------------------------------------------------------------------------


def choose_frames(
    spec: VAESpec, num_frames: int, mapping: Mapping, generator: torch.Generator | None = None
) -> FrameChoice:
    """psi of the paper for clips of `num_frames`: latent j > 0 stands for the frames of `spec.frame_span(j)`.

    "first" compares frame 0 alone; "slice" takes the last frame of each group, as the authors' X[::4] does;
    "average" the group's mean; "random" one frame of each group, drawn from `generator` (on the CPU; None: the
    global one). One choice is made per step and holds for the whole batch, on every worker.
    """
    if mapping not in MAPPINGS:
        raise ValueError(f"mapping: expected one of {MAPPINGS}, got {mapping!r}")
    spans = [spec.frame_span(latent) for latent in range(spec.num_latent_frames(num_frames))]
    if mapping == "first":
        return ((0,),)
    if mapping == "slice":
        return tuple((stop - 1,) for _, stop in spans)
    if mapping == "average":
        return tuple(tuple(range(start, stop)) for start, stop in spans)
    return tuple((int(torch.randint(start, stop, (1,), generator=generator)),) for start, stop in spans)


def map_frames(video_BCTHW: Tensor, choice: FrameChoice) -> Tensor:
    """psi(X): (B, 3, T, H, W) -> (B, 3, t, H, W), the mean of the chosen frames for each latent frame."""
    mapped = [video_BCTHW[:, :, frames[0] : frames[-1] + 1].mean(dim=2) for frames in choice]
    return torch.stack(mapped, dim=2)


# --- the image VAE, frame by frame -------------------------------------------------------------------------------


def decode_images(image_vae: ImageVAE, latent_BCTHW: Tensor) -> Tensor:
    """D_i of each latent frame: raw (B, C, t, h, w) -> (B, 3, t, H, W). Gradients reach the latents, no weight.

    ValueError if gradients are on and a weight of the image VAE would get one.
    """
    if torch.is_grad_enabled():
        _check_frozen(image_vae)
    frames = image_vae.decode(frames_to_batch(latent_BCTHW))
    return batch_to_frames(frames, num_clips=latent_BCTHW.shape[0])


@torch.no_grad()
def encode_images(image_vae: ImageVAE, video_BCTHW: Tensor) -> DiagonalGaussian:
    """E_i of each frame, without gradients: (B, 3, t, H, W) -> raw mean and logvar (B, C, t, h, w) each."""
    moments = image_vae.encode(frames_to_batch(video_BCTHW))
    return DiagonalGaussian.from_moments(batch_to_frames(moments, num_clips=video_BCTHW.shape[0]))


def _check_frozen(image_vae: ImageVAE) -> None:
    trained = [name for name, weight in image_vae.named_parameters() if weight.requires_grad]
    if trained:
        raise ValueError(
            f"image VAE: expected frozen weights, got {len(trained)} that require gradients, such as {trained[0]!r}; "
            f"call requires_grad_(False)"
        )


# --- the two sides, and a whole pass -----------------------------------------------------------------------------


def decoder_side(image_vae: ImageVAE, video_BCTHW: Tensor, latent_BCTHW: Tensor, choice: FrameChoice) -> Comparison:
    """What equation (2) compares: psi(X) and D_i of as many of the video VAE's (sampled) latent frames."""
    latent_BCTHW = latent_BCTHW[:, :, : len(choice)]
    return Comparison(map_frames(video_BCTHW, choice), decode_images(image_vae, latent_BCTHW))


def encoder_side(vae: VideoVAE, image_vae: ImageVAE, video_BCTHW: Tensor, choice: FrameChoice) -> Comparison:
    """What equation (1) compares: the clip and D_v of the image latents (their mean) of psi(X).

    With the mapping "first" that is the first frame alone.
    """
    prediction = vae.decode(encode_images(image_vae, map_frames(video_BCTHW, choice)).mode())
    return Comparison(video_BCTHW[:, :, : prediction.shape[2]], prediction)


class Reconstruction(NamedTuple):
    """A pass through the VAE. B counts image latents too if they were appended to the batch."""

    target_BCTHW: Tensor
    """What `video_BCTHW` should be."""
    posterior: DiagonalGaussian
    latent_BCTHW: Tensor
    """Drawn from the posterior; the clips' latents come first."""
    video_BCTHW: Tensor


def reconstruct(
    vae: VideoVAE,
    video_BCTHW: Tensor,
    settings: Regularization,
    *,
    image_vae: ImageVAE | None = None,
    draw: Draw = DiagonalGaussian.sample,
) -> Reconstruction:
    """Encode, draw, decode; with form "code" and an encoder side, the clips' image latents beside their own."""
    posterior, target_BCTHW = vae.encode(video_BCTHW), video_BCTHW
    if image_vae is not None and settings.form == "code" and settings.lambda_encoder:
        last_frames = map_frames(video_BCTHW, choose_frames(vae.spec, video_BCTHW.shape[2], "slice"))
        posterior = _joined(posterior, encode_images(image_vae, last_frames))
        target_BCTHW = torch.cat([video_BCTHW, video_BCTHW])
    latent_BCTHW = draw(posterior)
    return Reconstruction(target_BCTHW, posterior, latent_BCTHW, vae.decode(latent_BCTHW))


def forward_pass(
    vae: VideoVAE,
    video_BCTHW: Tensor,
    settings: Regularization,
    *,
    image_vae: ImageVAE | None = None,
    mapping_generator: torch.Generator | None = None,
    draw: Draw = DiagonalGaussian.sample,
) -> Forward:
    """Encode, sample, decode, and what the regularization compares, with gradients where the caller has them on.

    `mapping_generator` must give the same numbers on every worker of a step; `draw` samples a posterior (`.mode` for
    evaluation). ValueError if a side is asked for without an image VAE.
    """
    if settings.needs_image_vae and image_vae is None:
        raise ValueError("image_vae: expected one, since lambda_decoder or lambda_encoder is above 0; got None")
    num_clips, _, num_frames = video_BCTHW.shape[:3]
    made = reconstruct(vae, video_BCTHW, settings, image_vae=image_vae, draw=draw)
    decoder, encoder = None, None
    if image_vae is not None and settings.needs_image_vae:
        choice = choose_frames(vae.spec, num_frames, settings.mapping, mapping_generator)
        if settings.lambda_decoder:
            decoder = decoder_side(image_vae, video_BCTHW, made.latent_BCTHW[:num_clips], choice)
        if settings.lambda_encoder and settings.form == "equations":
            encoder = encoder_side(vae, image_vae, video_BCTHW, choice)
    return Forward(
        video_BCTHW=made.target_BCTHW,
        posterior=made.posterior,
        reconstruction_BCTHW=made.video_BCTHW,
        decoder_side=decoder,
        encoder_side=encoder,
    )


def _joined(first: DiagonalGaussian, second: DiagonalGaussian) -> DiagonalGaussian:
    return DiagonalGaussian(
        torch.cat([first.mean, second.mean.to(first.mean.dtype)]),
        torch.cat([first.logvar, second.logvar.to(first.logvar.dtype)]),
    )
