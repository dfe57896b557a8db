"""The networks of a run as its settings say: the VAE from what it starts, and the frozen and adversarial judges."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from cvvae import SPECS, VAESpec, VideoVAE, build_vae, load_vae
from cvvae.cv_vae import CVVAESpec
from cvvae.discriminator import PatchDiscriminator3d
from cvvae.image_vae import NORM_GROUPS, ImageVAE
from cvvae.image_vae_checkpoint import LoadedImageVAE, load_image_vae
from cvvae.image_vae_start import start_as_box_filter
from cvvae.inflation import inflate
from cvvae.iv_vae import IVVAE, IVVAESpec
from cvvae.keyframe_inflation import inflate_keyframes
from cvvae.layers import set_recomputation
from cvvae.losses import PerceptualDistance, VAELoss
from cvvae.lpips import load_lpips
from cvvae.regularization import Regularization
from pipeline.checkpoints import fetch_checkpoint
from pipeline.errors import ConfigError
from pipeline.training.frame_vae import FrameVAE
from pipeline.training.settings import LossSettings, ModelSettings, RegularizationSettings, TrainSettings, portable
from pipeline.training.steps import Players

IMAGE_WIDTHS = (128, 256, 512, 512)
"""Stable Diffusion's."""
Provenance = dict[str, str]
"""Where each network came from: for the model card."""


def build_players(settings: TrainSettings, device: torch.device) -> tuple[Players, Provenance]:
    """On the device, in float32, ready to train. ConfigError names the setting that cannot be met."""
    provenance: Provenance = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.loop.seed)  # what has no weights yet starts from the run's seed
        model = _model(settings.model, provenance)
        judge = _discriminator(settings.loss)
    teacher = _teacher(settings.regularization, model, provenance)
    _check_lengths(settings, model)
    regularization = settings.regularization
    sides = regularization.sides() if regularization else Regularization(lambda_decoder=0.0, lambda_encoder=0.0)
    model = model.to(device).train().requires_grad_(True)
    if settings.loop.checkpoint_blocks:
        set_recomputation(model, True)
    players = Players(
        model=model,
        loss=VAELoss(settings.loss.weights(), sides).to(device),
        last_layer=last_layer(model),
        discriminator=judge.to(device) if judge is not None else None,
        image_vae=teacher.to(device) if teacher is not None else None,
        perceptual=_perceptual(settings.loss, device),
    )
    return players, provenance


def last_layer(model: VideoVAE) -> Tensor:
    """The weight of the decoder's last convolution: the last kernel under `decoder`."""
    kernels = [value for name, value in model.named_parameters() if "decoder." in name and value.ndim >= 4]
    return kernels[-1]


def _model(settings: ModelSettings, provenance: Provenance) -> VideoVAE:
    if settings.kind == "image":
        return _image_model(settings, provenance)
    if settings.checkpoint is not None:
        with _about("model.checkpoint"):
            model = load_vae(fetch_checkpoint(settings.checkpoint, settings.options))
        if settings.spec is not None and model.spec.family != SPECS[settings.spec].family:
            raise ConfigError(f"model.spec: expected {settings.spec}, the checkpoint is {model.spec.name}")
        provenance["checkpoint"] = f"{_named(settings.checkpoint)} (sha256 {model.weights_sha256})"
        return model
    assert settings.spec is not None, "the settings' own check"
    spec = _sized(SPECS[settings.spec], settings)
    if settings.image_vae is not None and isinstance(spec, IVVAESpec):
        with _about("model.image_vae"):
            branch = load_vae(fetch_checkpoint(settings.image_vae, settings.options))
            if not isinstance(branch, IVVAE):
                raise ValueError(
                    f"expected an image VAE of IV-VAE's layers for spec {spec.name}, got {branch.spec.name}"
                )
            provenance["key-frame branch"] = f"{_named(settings.image_vae)} (sha256 {branch.weights_sha256})"
            return inflate_keyframes(branch, spec)
    if settings.image_vae is not None:
        image = _load_image_vae(settings.image_vae, settings, "model.image_vae")
        provenance["image VAE inflated"] = f"{_named(settings.image_vae)} (sha256 {image.weights_sha256})"
        with _about("model.image_vae"):
            return _inflated(image, spec)
    provenance["random weights"] = f"seed {settings.seed}"
    torch.manual_seed(settings.seed or 0)
    return build_vae(spec)


def _sized(spec: VAESpec, settings: ModelSettings) -> VAESpec:
    """With the widths and latent channels that the settings name. ConfigError if the family has no such choice."""
    custom = f"{spec.family}-custom"
    if settings.widths is not None:
        with _about("model.widths"):
            if not isinstance(spec, CVVAESpec):
                raise ValueError(
                    f"expected none for spec {spec.name}, got {settings.widths}: only CV-VAE's can be chosen"
                )
            groups = settings.norm_groups or spec.norm_groups
            spec = replace(spec, name=custom, widths=settings.widths, norm_groups=groups)
    channels = settings.latent_channels
    if channels is not None and channels != spec.latent_channels:
        with _about("model.latent_channels"):
            if not isinstance(spec, CVVAESpec | IVVAESpec):
                raise ValueError(
                    f"expected none for spec {spec.name}, got {channels}: only CV-VAE's and IV-VAE's can be"
                )
            scale, shift = settings.scaling_factor or 1.0, settings.shift_factor or 0.0
            spec = replace(spec, name=custom, latent_channels=channels, scaling_factor=scale, shift_factor=shift)
    return spec


def _inflated(image: LoadedImageVAE, spec: VAESpec) -> VideoVAE:
    if isinstance(spec, CVVAESpec):
        return inflate(image, spec)
    raise ValueError(f"expected a spec that an image VAE can be inflated into, got {spec.name}")


def _image_model(settings: ModelSettings, provenance: Provenance) -> FrameVAE:
    if settings.checkpoint is None:
        provenance["random weights"] = f"seed {settings.seed}"
        torch.manual_seed(settings.seed or 0)
        channels = settings.image_latent_channels
        vae = ImageVAE(
            in_channels=3,
            latent_channels=channels,
            widths=settings.widths or IMAGE_WIDTHS,
            norm_groups=settings.norm_groups or NORM_GROUPS,
        )
        if settings.start == "box_filter":
            with _about("model.start"):
                start_as_box_filter(vae)
        scale, shift = settings.scaling_factor or 1.0, settings.shift_factor or 0.0
    else:
        loaded = _load_image_vae(settings.checkpoint, settings, "model.checkpoint")
        provenance["checkpoint"] = f"{_named(settings.checkpoint)} (sha256 {loaded.weights_sha256})"
        vae, scale, shift = loaded.vae, loaded.scaling_factor, loaded.shift_factor
    return FrameVAE(vae, scaling_factor=scale, shift_factor=shift)


def _load_image_vae(url: str, settings: ModelSettings | RegularizationSettings, name: str) -> LoadedImageVAE:
    with _about(name):
        return load_image_vae(
            fetch_checkpoint(url, settings.options),
            scaling_factor=settings.scaling_factor,
            shift_factor=settings.shift_factor,
        )


def _teacher(settings: RegularizationSettings | None, model: VideoVAE, provenance: Provenance) -> ImageVAE | None:
    """ConfigError if its latents cannot be the video VAE's."""
    if settings is None or not settings.sides().needs_image_vae:
        return None
    loaded = _load_image_vae(settings.image_vae, settings, "regularization.image_vae")
    spec, teacher = model.spec, loaded.vae
    facts = {
        "latent channels": (spec.latent_channels, teacher.latent_channels),
        "space stride": (spec.space_stride, 2 ** (len(teacher.widths) - 1)),
        "scaling_factor": (spec.scaling_factor, loaded.scaling_factor),
        "shift_factor": (spec.shift_factor, loaded.shift_factor),
    }
    wrong = [f"{name}: expected {ours}, got {its}" for name, (ours, its) in facts.items() if ours != its]
    if wrong:
        raise ConfigError(
            f"regularization.image_vae: {settings.image_vae}: its latents are not those of {spec.name}: "
            + "; ".join(wrong)
        )
    provenance["image VAE of the regularization"] = f"{_named(settings.image_vae)} (sha256 {loaded.weights_sha256})"
    return teacher


def _discriminator(settings: LossSettings) -> PatchDiscriminator3d | None:
    if not settings.adversarial:
        return None
    judge = PatchDiscriminator3d(width=settings.discriminator_channels, half_3d=settings.discriminator_half_3d)
    judge.initialise()
    return judge


def _perceptual(settings: LossSettings, device: torch.device) -> PerceptualDistance | None:
    if not settings.perceptual:
        return None
    assert settings.lpips_weights is not None, "the settings' own check"
    with _about("loss.lpips_weights"):
        return load_lpips(fetch_checkpoint(settings.lpips_weights), "vgg").to(device)


def _check_lengths(settings: TrainSettings, model: VideoVAE) -> None:
    """ConfigError if a source's samples are none that the VAE takes."""
    for source in settings.all_sources:
        with _about(f"data.sources.{source.name}"):
            model.spec.latent_shape(source.frames, *source.size)


def _named(url: str) -> str:
    """For people: without a path of this machine."""
    return str(portable(url))


@contextmanager
def _about(setting: str) -> Iterator[None]:
    """What is wrong with a file or a size is wrong with a setting."""
    try:
        yield
    except ConfigError:
        raise
    except (ValueError, OSError) as error:
        raise ConfigError(f"{setting}: {error}") from error
