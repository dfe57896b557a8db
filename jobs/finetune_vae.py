"""Finetune a video VAE with the latent-space regularization of CV-VAE, or train the image VAE it starts from.

    ray job submit -- python jobs/finetune_vae.py configs/finetune/cvvae_sd3.yaml
    python jobs/finetune_vae.py configs/finetune/tiny_cvvae.yaml --set workers.count=0

Start it again after anything whatever: it goes on from its last checkpoint with the same loss curve.
`latents finetune run` is this same function; `latents finetune submit` sends it to a cluster.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.config import load_config
from jobs.finetune_config import FinetuneConfig
from jobs.finetune_display import FinetuneDisplay
from jobs.messages import report_errors
from pipeline.errors import ConfigError
from pipeline.training.trainer import train
from pipeline.training.workers import Workers

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file such as configs/finetune/tiny_cvvae.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Override a setting: section.setting=value (YAML).")
]


def finetune(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train a VAE; start it again to resume."""
    with report_errors():
        run_finetune(load_config(FinetuneConfig, config, overrides or ()))


def run_finetune(config: FinetuneConfig) -> dict[str, Any]:
    """The whole job; `trainer.RunResult` as a dict. Errors as `trainer.train`."""
    settings, workers = config.run_settings(), config.workers
    with FinetuneDisplay(settings) as display:
        if workers.count == 0:
            if workers.threads:
                torch.set_num_threads(workers.threads)
            result = train(settings, Workers(device=_device(workers.gpus)), display)
            end = {"steps": result.steps, "figures": result.figures, "export_url": result.export_url}
        else:
            end = _on_ray(config, display)
    display.finished(end)
    return end


def _on_ray(config: FinetuneConfig, display: FinetuneDisplay) -> dict[str, Any]:
    from jobs.cluster import connected, require_lasting_output
    from jobs.config import ClusterConfig
    from jobs.train_workers import train_on_ray

    require_lasting_output(config.output.url)
    with connected(ClusterConfig(address=config.workers.address)):
        return train_on_ray(config.run_settings(), config.workers, display)


def _device(gpus: float | None) -> torch.device:
    """ConfigError if a GPU is asked for and none is there."""
    if gpus and not torch.cuda.is_available():
        raise ConfigError(f"workers.gpus: expected 0 on a machine without a GPU, got {gpus:g}")
    return torch.device("cuda" if torch.cuda.is_available() and gpus != 0 else "cpu")


if __name__ == "__main__":
    typer.run(finetune)
