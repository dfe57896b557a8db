"""A paper's ablation as one command: runs variants of a finetune, evaluates them alike, writes one table.

    python jobs/ablate_vae.py configs/ablations/tiny/regularization.yaml
    python jobs/ablate_vae.py configs/ablations/full/regularization.yaml --address http://HEAD:8265 --at-once 2

Start it again after anything whatever: finished variants are not run again, a begun one goes on. With --address each
variant is a job of that cluster's job API; this command waits for them, and evaluates here. `latents ablate` is this
same function.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.ablation.config import AblationConfig
from jobs.ablation.runs import Runner, VariantRun, cluster_runner, run_here, run_variants
from jobs.ablation.table import make_table
from jobs.config import load_config
from jobs.evaluate_vae import load_judge, load_vaes, open_device
from jobs.evaluation.compatibility import Judge
from jobs.evaluation.page import write_page
from jobs.evaluation.presets import ClipShape, Preset
from jobs.evaluation.report import write_report
from jobs.evaluation.run import Evaluation, NamedVAE, run_evaluation
from jobs.finetune_config import FinetuneConfig
from jobs.messages import report_errors
from pipeline.errors import ConfigError
from pipeline.training.batches import plan_shards

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file such as configs/ablations/tiny/mapping.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting of the ablation: section.setting=value (YAML).")
]


def ablate(
    config: ConfigFile,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(help="These variants alone; the table has them alone.")] = None,
    address: Annotated[str | None, typer.Option(help="A cluster's job API; else the runs are made here.")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="Jobs on the cluster at a time.")] = 1,
) -> None:
    """Run a finetune's variants and print one table; start it again to go on."""
    console = Console(highlight=False)
    with report_errors():
        ablation = chosen(load_config(AblationConfig, config, overrides or ()), only or ())
        if at_once > 1 and address is None:
            raise ConfigError("--at-once: expected 1 where the runs are made here, without --address")
        runs = run_ablation(ablation, console, address=address, at_once=at_once)
    raise typer.Exit(1 if any(run.failure for run in runs) else 0)


def chosen(config: AblationConfig, only: Sequence[str]) -> AblationConfig:
    """With these variants alone. ConfigError for one that there is not."""
    unknown = sorted(set(only) - set(config.variants))
    if unknown:
        raise ConfigError(f"--only: expected of {', '.join(config.variants)}, got {', '.join(unknown)}")
    if not only:
        return config
    kept = {name: changes for name, changes in config.variants.items() if name in only}
    published = {name: text for name, text in config.published.items() if name in only}
    return config.model_copy(update={"variants": kept, "published": published})


def run_ablation(
    config: AblationConfig, console: Console, *, address: str | None = None, at_once: int = 1
) -> list[VariantRun]:
    """All of it; every variant's config is checked before the first one runs. ConfigError, SourceError."""

    def tell(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    finetunes = config.finetunes()
    check_evaluation(config, finetunes)
    run: Runner = run_here if address is None else cluster_runner(config, address, tell)
    runs = run_variants(config, finetunes, run, tell, at_once=at_once)
    ready = [one.name for one in runs if one.failure is None]
    report, parameters = _evaluated(config, finetunes, ready, console) if ready else (None, {})
    table = make_table(config, runs, parameters, report)
    about = {
        "name": config.name,
        "base": config.base.as_posix(),
        "overrides": list(config.overrides),
        "variants": {name: list(changes) for name, changes in config.variants.items()},
    }
    path = table.write(config.report, about)
    table.show(console)
    tell(str(path))
    return runs


def check_evaluation(config: AblationConfig, finetunes: Mapping[str, FinetuneConfig]) -> None:
    """ConfigError, before anything runs, if the evaluation cannot be made."""
    clips_of(config, finetunes)
    device = open_device(config.evaluation.device)
    if config.evaluation.image_vae is not None:
        load_judge(f"image-vae={config.evaluation.image_vae}", device)


def clips_of(config: AblationConfig, finetunes: Mapping[str, FinetuneConfig]) -> tuple[str, ...]:
    """The clips that variants are judged on. ConfigError if neither the ablation nor its base has any,
    SourceError if the base's are not there."""
    if config.evaluation.clips:
        return config.evaluation.clips
    held_out = next(iter(finetunes.values())).data.held_out
    if held_out is None:
        raise ConfigError(f"evaluation.clips: expected some, since {config.base} has no data.held_out; got none")
    return tuple(shard.url for shard in plan_shards(held_out))


def _evaluated(
    config: AblationConfig, finetunes: Mapping[str, FinetuneConfig], ready: Sequence[str], console: Console
) -> tuple[dict[str, Any], dict[str, int]]:
    """The evaluation's report and the number of weights, of the variants whose VAE is there."""
    settings, device = config.evaluation, open_device(config.evaluation.device)
    named = [f"{variant}={config.run_url(variant)}/export" for variant in ready]
    vaes: dict[str, NamedVAE] = load_vaes(named, seed=settings.seed, dtype=torch.float32, device=device)
    preset = Preset(
        name=config.name,
        about=config.about,
        shapes=(ClipShape(settings.frames, settings.size),),
        frame_stride=settings.frame_stride,
        metrics=settings.metrics,
        limit=settings.limit,
    )
    evaluation = Evaluation(
        preset=preset,
        vaes=vaes,
        clips=clips_of(config, finetunes),
        windows_per_clip=settings.windows_per_clip,
        motion_buckets=settings.motion_buckets,
        device=device,
        seed=settings.seed,
        decode_children=settings.decode_children,
        judge=_judge_of(vaes, settings.image_vae, device),
    )
    folder = config.report / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    report, pictures = run_evaluation(evaluation, folder, console)
    write_report(report, folder)
    write_page(report, pictures.gallery, pictures.strips, folder)
    return report, {label: sum(p.numel() for p in one.vae.parameters()) for label, one in vaes.items()}


def _judge_of(vaes: Mapping[str, NamedVAE], url: str | None, device: torch.device) -> Judge | None:
    """The image VAE, if the latents of any variant can be its: a table without those columns beats none."""
    if url is None:
        return None
    judge = load_judge(f"image-vae={url}", device)
    return judge if any(judge.refusal(named.vae.spec) is None for named in vaes.values()) else None


if __name__ == "__main__":
    typer.run(ablate)
