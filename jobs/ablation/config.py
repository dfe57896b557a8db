"""configs/ablations/**/*.yaml: a finetune config, its variants as overrides, and how they are judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from jobs.config import load_config
from jobs.evaluation.presets import Metric
from jobs.finetune_config import FinetuneConfig
from pipeline.errors import ConfigError
from pipeline.policies import Policy, PublicUrl, StoreOptions

VariantName = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]{0,22}[a-z0-9])?$")]
"""Short enough that NAME-VARIANT is the name of a job."""


class AblationEvaluation(Policy):
    """How all variants are judged: `latents evaluate` on the same windows."""

    clips: tuple[PublicUrl, ...] = ()
    """Files, folders, globs or tars of clips; none: the held-out samples of the finetune config."""
    frames: Annotated[int, Field(ge=1)] = 17
    """Frames of a window; the longest up to it that all variants take."""
    size: tuple[Annotated[int, Field(ge=8)], Annotated[int, Field(ge=8)]] | None = (256, 256)
    """(height, width); null: each clip's own."""
    frame_stride: Annotated[int, Field(ge=1)] = 1
    """Every n-th frame."""
    windows_per_clip: Annotated[int, Field(ge=1)] = 1
    """Windows from a clip's start on."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """So many clips at random; null: all. Not for tars."""
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] = ("psnr", "ssim")
    """As `latents evaluate --metric`; lpips and fvd need their weights."""
    image_vae: PublicUrl | None = None
    """The image VAE whose latents the variants' should be; null: compatibility is not measured."""
    motion_buckets: Annotated[int, Field(ge=1)] = 2
    """Parts of equal count by motion; the table shows the stillest and the most moving."""
    device: str = "cpu"
    """cpu, cuda, cuda:1."""
    decode_children: Annotated[int, Field(ge=1)] = 1
    """Processes that decode."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of what is random in an evaluation."""


class AblationConfig(Policy):
    """configs/ablations/**/*.yaml"""

    name: VariantName
    """Names the jobs on a cluster, with the variant's name after it."""
    about: str = ""
    """Stands over the table."""
    base: Path
    """The finetune config that variants change."""
    overrides: tuple[str, ...] = ()
    """Changes for all variants, as after --set: "loop.steps=600"."""
    variants: Annotated[dict[VariantName, tuple[str, ...]], Field(min_length=1)]
    """Changes of each variant, on top of those."""
    runs: PublicUrl
    """Where the runs live, a folder for each variant: a local folder or any fsspec URL."""
    report: Path
    """Local folder for the table and the evaluation."""
    evaluation: AblationEvaluation = AblationEvaluation()
    published: Annotated[dict[VariantName, str], Field(default_factory=dict)]
    """What a paper has for a variant, shown beside what came out here."""
    published_as: str = "published"
    """Head of that column: the paper's table and its metrics."""
    options: StoreOptions
    """fsspec options of the runs' store; no credentials."""

    @model_validator(mode="after")
    def _published_are_variants(self) -> Self:
        unknown = sorted(set(self.published) - set(self.variants))
        if unknown:
            raise ValueError(f"published: expected some of {sorted(self.variants)}, got {unknown}")
        return self

    def settings_of(self, variant: str) -> tuple[str, ...]:
        """The overrides of the finetune config that make a variant."""
        return (*self.overrides, *self.variants[variant], f"output.url={self.run_url(variant)}")

    def run_url(self, variant: str) -> str:
        return f"{self.runs.rstrip('/')}/{variant}"

    def finetunes(self) -> Mapping[str, FinetuneConfig]:
        """Every variant's finetune config. ConfigError names the variant that is none."""
        configs: dict[str, FinetuneConfig] = {}
        for variant in self.variants:
            try:
                configs[variant] = load_config(FinetuneConfig, self.base, self.settings_of(variant))
            except ConfigError as error:
                raise ConfigError(f"variant {variant}: {error}") from error
        return configs
