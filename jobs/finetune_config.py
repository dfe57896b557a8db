"""configs/finetune/*.yaml: the run's settings and where it runs."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from pipeline.policies import Policy
from pipeline.training.settings import TrainSettings


class WorkersConfig(Policy):
    """Where a run runs. None of it changes the run's numbers but for rounding."""

    address: str | None = None
    """Ray address; None uses $RAY_ADDRESS (set inside a submitted job), else starts Ray on this machine."""
    count: Annotated[int, Field(ge=0)] | None = 0
    """Workers, each with a replica of the networks; it must divide data.lanes. 0: this process alone, without Ray.
    None: one per GPU of the cluster, or one."""
    gpus: Annotated[float, Field(ge=0, le=1)] | None = None
    """GPUs of each worker; None: 1 if the machine or the cluster has any, else 0."""
    cpus: Annotated[int, Field(ge=1)] | None = None
    """Cores that Ray reserves for each worker: threads and decode processes. None: 1 + data.decode_children."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads of each worker; None: PyTorch's own choice, or the reserved cores under Ray."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """How often Ray starts the workers again after one was lost; each time from the last checkpoint."""


class FinetuneConfig(TrainSettings):
    """configs/finetune/*.yaml"""

    workers: WorkersConfig = WorkersConfig()

    def run_settings(self) -> TrainSettings:
        """Without the cluster."""
        return TrainSettings.model_validate(self.model_dump(exclude={"workers"}))
