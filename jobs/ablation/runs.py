"""The runs of an ablation, one after another here or as jobs of a cluster. What is finished is not run again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.ablation.config import AblationConfig
from jobs.finetune_config import FinetuneConfig
from jobs.finetune_vae import run_finetune
from pipeline.errors import ConfigError, PipelineError
from pipeline.storage import Store
from pipeline.training.settings import portable

if TYPE_CHECKING:
    from jobs.submit import Submission

FINISHED = "finished.json"
PATIENCE_SECONDS = 600.0
"""How long a cluster may be silent while a job of it is waited for."""
Tell = Callable[[str], None]
"""Is told a line of what goes on."""
Runner = Callable[[str, FinetuneConfig], None]
"""Runs a variant to its end; PipelineError if it fails."""


@dataclass(frozen=True, slots=True)
class VariantRun:
    """What became of a variant."""

    name: str
    settings: FinetuneConfig
    failure: str | None = None


def run_variants(
    config: AblationConfig, finetunes: Mapping[str, FinetuneConfig], run: Runner, tell: Tell, *, at_once: int = 1
) -> list[VariantRun]:
    """Every variant in the config's order. A variant that fails is told and does not stop the others."""

    def one(item: tuple[str, FinetuneConfig]) -> VariantRun:
        variant, settings = item
        store = Store(config.run_url(variant), options=config.options)
        if is_finished(store, settings):
            tell(f"{variant}: finished before")
            return VariantRun(variant, settings)
        tell(f"{variant}: {' '.join(config.variants[variant]) or 'the base config'}")
        try:
            run(variant, settings)
        except PipelineError as error:
            tell(f"{variant}: failed: {error}")
            return VariantRun(variant, settings, failure=str(error))
        store.replace(FINISHED, json.dumps(_identity(settings), indent=1).encode())
        return VariantRun(variant, settings)

    if at_once == 1:
        return [one(item) for item in finetunes.items()]
    with ThreadPoolExecutor(at_once) as pool:
        return list(pool.map(one, finetunes.items()))


def run_here(variant: str, settings: FinetuneConfig) -> None:
    """In this process, or on the Ray cluster that `workers` names; resumes what was begun."""
    run_finetune(settings)


def cluster_runner(config: AblationConfig, address: str | None, tell: Tell) -> Runner:
    """Runs variants as jobs NAME-VARIANT of a cluster's job API; one that is under way there is waited for."""
    from jobs.submit import find, submit_finetune

    def alive(name: str) -> Submission | None:
        try:
            latest = find(name, address=address)
        except ConfigError:  # the cluster knows none
            return None
        return None if latest.status().is_terminal() else latest

    def run(variant: str, settings: FinetuneConfig) -> None:
        name = f"{config.name}-{variant}"
        submission = alive(name)
        if submission is None:
            submission = submit_finetune(
                config.base,
                name=name,
                address=address,
                overrides=config.settings_of(variant),
                working_dir=Path.cwd(),
            )
        tell(f"{variant}: job {submission.id}")
        status = submission.wait(patience_seconds=PATIENCE_SECONDS)
        if status.value != "SUCCEEDED":
            raise PipelineError(f"job {submission.id} ended as {status.value}: latents finetune follow {name}")

    return run


def is_finished(store: Store, settings: FinetuneConfig) -> bool:
    """Whether the run there is this one, and came to its end."""
    try:
        found = json.loads(store.read_bytes(FINISHED))
    except FileNotFoundError:
        return False
    except ValueError as error:
        raise ConfigError(
            f"{store.full_url(FINISHED)}: not JSON: {error}; delete it to run the variant again"
        ) from error
    return found == _identity(settings)


def _identity(settings: FinetuneConfig) -> dict[str, Any]:
    run = settings.run_settings()
    plain = {"identity": run.identity(), "steps": run.loop.steps, "export_dtype": run.keep.export_dtype}
    return json.loads(json.dumps(portable(plain)))


def failures(runs: list[VariantRun]) -> Iterator[str]:
    """A line for each variant that has no VAE."""
    yield from (f"{run.name}: {run.failure}" for run in runs if run.failure is not None)
