"""What a finetune run does, as frozen data: the sections of configs/finetune/*.yaml that decide its numbers.

Batch sizes count the samples of a step over all workers, so that the same config gives the same run on any number of
them. Where published recipes give a batch per GPU, the shipped configs multiply.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from cvvae import SPECS
from cvvae.losses import LossWeights
from cvvae.regularization import Form, Mapping, Regularization
from pipeline.policies import DTypeName, Policy, PublicUrl, StoreOptions
from pipeline.sources import WebDatasetSource
from pipeline.sources.spec import VIDEO_EXTENSIONS

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "bmp")
Betas = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]]
Side = Annotated[int, Field(ge=8)]


class ModelSettings(Policy):
    """What is trained, and from what it starts: exactly one of `checkpoint`, `image_vae` and `seed`."""

    kind: Literal["video", "image"] = "video"
    """video: a video VAE. image: the image VAE that a CV-VAE is inflated from; it sees single frames."""
    spec: str | None = None
    """Name of the video VAE's literal spec; needed unless `checkpoint` is given."""
    checkpoint: PublicUrl | None = None
    """Continue this VAE: a folder with config.json and safetensors, or a training checkpoint file."""
    image_vae: PublicUrl | None = None
    """Inflate this image VAE (an LDM file or a diffusers folder) into `spec`: CV-VAE, or IV-VAE's keyframe branch."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Start from random weights of this seed."""
    widths: tuple[Annotated[int, Field(ge=32, multiple_of=32)], ...] | None = None
    """Channels of each level, finest first, of an image VAE from `seed` or of a CV-VAE that is not continued. None:
    the spec's, or Stable Diffusion's."""
    norm_groups: Annotated[int, Field(ge=1, le=32)] | None = None
    """Groups of their norms. None: 32. A narrow VAE needs fewer: groups of one channel take its level away."""
    start: Literal["random", "box_filter"] = "random"
    """kind image from `seed`: PyTorch's own weights, or ones that shrink and enlarge pictures like a box filter, from
    which a small VAE learns in far fewer steps."""
    latent_channels: Annotated[int, Field(ge=1)] | None = None
    """Channels of the latents of a CV-VAE or IV-VAE that is not continued. None: the spec's. With any other number
    its scale is `scaling_factor`, or 1: it was never measured."""
    image_latent_channels: Annotated[int, Field(ge=1)] = 4
    """kind image from `seed`: channels of its latents."""
    scaling_factor: Annotated[float, Field(gt=0)] | None = None
    """Scale of the image VAE's latents: written to the config of one from `seed`; to be given for an LDM file, which
    does not state it."""
    shift_factor: float | None = None
    """Shift of its latents, likewise."""
    options: StoreOptions
    """fsspec options of the checkpoint's store; no credentials."""

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        starts = [name for name in ("checkpoint", "image_vae", "seed") if getattr(self, name) is not None]
        if len(starts) != 1:
            raise ValueError(f"model: expected one of checkpoint, image_vae and seed, got {starts or 'none'}")
        if self.kind == "image" and (self.image_vae or self.spec):
            raise ValueError("model: kind image takes checkpoint or seed, and no spec")
        if self.kind == "image" and self.seed is not None and self.scaling_factor is None:
            raise ValueError("model.scaling_factor: expected one for an image VAE from seed, got none")
        if self.kind == "video" and not self.checkpoint and self.spec is None:
            raise ValueError("model.spec: expected the name of a spec, got none")
        if self.norm_groups is not None and (self.widths is None or 32 % self.norm_groups):
            raise ValueError(f"model.norm_groups: expected a divisor of 32, beside widths, got {self.norm_groups}")
        if self.spec is not None and self.spec not in SPECS:
            raise ValueError(f"model.spec: expected one of {sorted(SPECS)}, got {self.spec!r}")
        return self


class SampleSource(Policy):
    """One kind of batch: where its samples come from, how they are cut, and how often it is drawn."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9_]+$")]
    """Names it in metrics and seeds."""
    urls: Annotated[tuple[PublicUrl, ...], Field(min_length=1)] | PublicUrl
    """WebDataset tars: a folder, a glob, a brace pattern, a file, or a list of these."""
    media: Literal["video", "image"] = "video"
    """video: clips (frames: 1 takes single frames of them). image: pictures."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share of the steps that draw from here, relative to the other sources."""
    batch_size: Annotated[int, Field(ge=1)] = 1
    """Samples of a step, over all workers."""
    frames: Annotated[int, Field(ge=1)] = 1
    """Frames of a sample: a length that the VAE takes."""
    size: tuple[Side, Side] = (256, 256)
    """(height, width) of the crop, in pixels."""
    short_side: Annotated[int, Field(ge=8)] | tuple[Side, Side] | None = None
    """The picture is resized to this short side before it is cropped; a pair draws one between. None: the smallest
    that the crop fits in."""
    crop: Literal["random", "center"] = "random"
    """Where the crop is taken."""
    frame_stride: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (1, 1)
    """Every n-th frame is kept, n drawn from this range; a clip too short for it is read at a smaller n."""
    max_start: Annotated[int, Field(ge=0)] = 0
    """A sample starts at a source frame drawn from 0 to this one, or at frame 0 where the clip ends before."""
    options: StoreOptions
    """fsspec options of the store; no credentials."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        low, high = self.frame_stride
        if low > high:
            raise ValueError(f"frame_stride: expected (smallest, largest), got {self.frame_stride}")
        if self.media == "image" and self.frames != 1:
            raise ValueError(f"frames: expected 1 for media image, got {self.frames}")
        sides = self.short_sides
        if min(sides) < max(self.size) or sides[0] > sides[1]:
            raise ValueError(f"short_side: expected at least the crop's longer side {max(self.size)}, got {sides}")
        return self

    @property
    def short_sides(self) -> tuple[int, int]:
        """The smallest and largest short side."""
        if self.short_side is None:
            return max(self.size), max(self.size)
        return self.short_side if isinstance(self.short_side, tuple) else (self.short_side, self.short_side)

    def tars(self) -> WebDatasetSource:
        """The source as the encode job's reader takes it."""
        extensions = VIDEO_EXTENSIONS if self.media == "video" else IMAGE_EXTENSIONS
        return WebDatasetSource(urls=self.urls, video_extensions=extensions, options=self.options)


class DataSettings(Policy):
    """The samples of a run, and the held-out ones that it is judged by."""

    sources: Annotated[tuple[SampleSource, ...], Field(min_length=1)]
    """Each step draws one of them by weight; its whole batch is of that source."""
    held_out: SampleSource | None = None
    """Samples that are never trained on: the first `held_out_samples` in order, cut in the centre."""
    held_out_samples: Annotated[int, Field(ge=1)] = 16
    """How many of them an evaluation looks at."""
    lanes: Annotated[int, Field(ge=1)] = 1
    """Independent streams that a source's tars are dealt to. Part of the order of samples; the number of workers must
    divide it."""
    shuffle_buffer: Annotated[int, Field(ge=1)] = 32
    """Samples of a tar that are held to be drawn from in random order."""
    decode_children: Annotated[int, Field(ge=1)] = 2
    """Decode processes of each worker."""
    prefetch_batches: Annotated[int, Field(ge=1)] = 2
    """Batches that are ready ahead of the step that needs them."""

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Self:
        names = [source.name for source in self.sources]
        if len(set(names)) != len(names):
            raise ValueError(f"data.sources: expected distinct names, got {names}")
        for source in self.sources:
            if source.batch_size % self.lanes:
                raise ValueError(
                    f"data.sources.{source.name}.batch_size: expected a multiple of data.lanes={self.lanes}, "
                    f"got {source.batch_size}"
                )
        return self


class OptimizerSettings(Policy):
    """AdamW and its learning rate over the run."""

    lr: Annotated[float, Field(gt=0)] = 1e-4
    """Learning rate after the warm-up."""
    betas: Betas = (0.9, 0.98)
    """AdamW's decay rates."""
    eps: Annotated[float, Field(gt=0)] = 1e-4
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """cosine: from lr down to lr * floor over `schedule_steps`, then constant."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the rate rises from 0."""
    schedule_steps: Annotated[int, Field(ge=1)] | None = None
    """Step at which the cosine has reached its floor; None: the run's last."""
    floor: Annotated[float, Field(ge=0, le=1)] = 0.005
    """Lowest rate as a share of lr."""


class LossSettings(Policy):
    """The reconstruction, KL and adversarial terms: `cvvae.losses.LossWeights`, which explains them."""

    pixel_error: Literal["absolute", "squared"] = "absolute"
    """absolute as the authors' code has it, squared as the paper's equations."""
    log_variance: Literal["learned", "fixed"] = "learned"
    """fixed: none, as IV-VAE trains."""
    perceptual: Annotated[float, Field(ge=0)] = 0.5
    """Weight of LPIPS beside the pixel error; above 0 it needs `lpips_weights`."""
    lpips_weights: PublicUrl | None = None
    """A converted LPIPS (VGG) weight file: a local path or any fsspec URL."""
    kl: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the KL divergence, a sum over the latent; LDM's was 1e-6."""
    adversarial: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the GAN beside its adaptive weight; 0: none, and no discriminator."""
    adversarial_start: Annotated[int, Field(ge=0)] = 1
    """The first step with the GAN."""
    discriminator_channels: Annotated[int, Field(ge=32, multiple_of=32)] = 64
    """Channels of the discriminator's first layer."""
    discriminator_half_3d: bool = False
    """The discriminator's second convolutions are 2-D: 18.1 instead of 29.0 million weights."""

    @model_validator(mode="after")
    def _lpips_is_there(self) -> Self:
        if self.perceptual and self.lpips_weights is None:
            raise ValueError("loss.lpips_weights: expected a weight file for perceptual above 0, got none")
        return self

    def weights(self) -> LossWeights:
        """As the losses take them."""
        chosen = ("pixel_error", "log_variance", "perceptual", "kl", "adversarial", "adversarial_start")
        return LossWeights(**{name: getattr(self, name) for name in chosen})


class RegularizationSettings(Policy):
    """The latent-space regularization of CV-VAE, arXiv 2405.20279 section 3.1: `cvvae.regularization`."""

    image_vae: PublicUrl
    """The frozen image VAE whose latent space is kept: an LDM file or a diffusers folder."""
    scaling_factor: float | None = None
    """Scale of its latents, for an LDM file, which does not state it; a folder's config does."""
    shift_factor: float | None = None
    """Shift of its latents, likewise."""
    options: StoreOptions
    """fsspec options of its store; no credentials."""
    lambda_decoder: Annotated[float, Field(ge=0)] = 1.0
    """lambda 1 of equation 3: the frozen image decoder reads the video latents (equation 2)."""
    lambda_encoder: Annotated[float, Field(ge=0)] = 0.0
    """lambda 2 of equation 3: the video decoder reads the frozen image encoder's latents (equation 1)."""
    mapping: Mapping = "random"
    """psi: which frame stands for the frames of a latent."""
    form: Form = "code"
    """Whether the encoder's side is computed as the authors' code does, or as the equations say."""

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        self.sides()
        return self

    def sides(self) -> Regularization:
        """As the losses take it. ValueError on what cannot be meant."""
        chosen = ("lambda_decoder", "lambda_encoder", "mapping", "form")
        return Regularization(**{name: getattr(self, name) for name in chosen})


class LoopSettings(Policy):
    """The optimisation."""

    steps: Annotated[int, Field(ge=1)]
    """Batches of the whole run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Decides samples, crops and noise."""
    precision: DTypeName = "float32"
    """dtype of the arithmetic under autocast; weights and optimizers stay float32."""
    micro_batch: Annotated[int, Field(ge=1)] | None = None
    """Samples that a worker holds at once; the step's gradient is accumulated over the rest. None: all."""
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Largest norm of the gradient."""
    checkpoint_blocks: bool = False
    """Gradient checkpointing: blocks are computed again in the backward pass instead of kept."""
    alternate: Literal["parity", "both"] = "parity"
    """With a discriminator. parity: even steps train the VAE, odd ones the discriminator, as the authors do. both:
    each step trains both."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Decay of the moving average of the weights, which is then evaluated and exported. None: none is kept."""


class KeepSettings(Policy):
    """What is written while the run goes on."""

    checkpoint_every: Annotated[int, Field(ge=1)] = 1000
    """Steps between checkpoints."""
    keep_last: Annotated[int, Field(ge=1)] = 3
    """Checkpoints that are kept, beside the best."""
    log_every: Annotated[int, Field(ge=1)] = 10
    """Steps between rows of metrics.csv: means over those steps."""
    evaluate_every: Annotated[int, Field(ge=1)] = 1000
    """Steps between evaluations on the held-out samples; one is made at the start and one at the end, too."""
    pictures_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between pictures of reconstructions; None: with each evaluation."""
    export_dtype: DTypeName = "float32"
    """dtype of the exported weights."""
    standardize_latents: bool = False
    """kind image: export it with latents of mean shift_factor and standard deviation 1 / scaling_factor per channel,
    measured on the held-out samples of the first worker; what it decodes stays the same."""
    tensorboard: bool = False
    """Write TensorBoard event files, too; needs the extra 'finetune'."""


class RunOutput(Policy):
    """Where the run lives: checkpoints, metrics, pictures, the exported VAE."""

    url: PublicUrl
    """A local folder or any fsspec URL."""
    single_driver: bool = False
    """Promise that one run at a time writes here; needed for stores without conditional writes."""
    options: StoreOptions
    """fsspec options of the store; no credentials."""


class TrainSettings(Policy):
    """All that decides a run's numbers. The cluster it runs on is not part of it."""

    model: ModelSettings
    data: DataSettings
    loop: LoopSettings
    generator: OptimizerSettings = OptimizerSettings()
    discriminator: OptimizerSettings = OptimizerSettings(lr=2e-5, schedule="constant")
    loss: LossSettings
    regularization: RegularizationSettings | None = None
    keep: KeepSettings = KeepSettings()
    output: RunOutput

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        if self.model.kind == "image":
            if self.regularization is not None:
                raise ValueError("regularization: expected none for model.kind image")
            long = [source.name for source in self.all_sources if source.frames != 1]
            if long:
                raise ValueError(f"data.sources: expected frames: 1 for model.kind image, got more in {long}")
        if self.keep.standardize_latents and (self.model.kind != "image" or self.data.held_out is None):
            raise ValueError("keep.standardize_latents: expected model.kind image and data.held_out to measure on")
        return self

    @property
    def all_sources(self) -> tuple[SampleSource, ...]:
        """The training sources, and the held-out one if there is one."""
        return (*self.data.sources, *((self.data.held_out,) if self.data.held_out else ()))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it resumes: all but how long and how loud.

        Without what is None, so that a run can go on after a setting was added that it never had.
        """
        plain = self.model_dump(mode="json", exclude={"output", "keep"}, exclude_none=True)
        plain["loop"].pop("steps")
        for name in ("decode_children", "prefetch_batches", "held_out", "held_out_samples"):
            plain["data"].pop(name, None)
        return plain


def portable(value: Any) -> Any:
    """A setting with paths under the working directory relative to it: a submitted job has another one each time."""
    if isinstance(value, dict):
        return {name: portable(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [portable(inner) for inner in value]
    return value.removeprefix(f"{Path.cwd()}/") if isinstance(value, str) else value
