"""The manifests name scripts, verbs and configs that are there, in the fields that KubeRay and Kubernetes demand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobs.finetune_verbs import app

PROJECT = Path(__file__).resolve().parents[2]


def manifest(name: str) -> dict[str, Any]:
    return yaml.safe_load((PROJECT / "infra" / name).read_text())


def test_the_ray_job() -> None:
    job = manifest("finetune-rayjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint",
        "shutdownAfterJobFinishes",
        "ttlSecondsAfterFinished",
        "backoffLimit",
        "rayClusterSpec",
    }
    interpreter, script, config = shlex.split(spec["entrypoint"])
    assert interpreter == "python"
    assert (PROJECT / script).is_file()
    assert (PROJECT / config).is_file()
    cluster = spec["rayClusterSpec"]
    pods = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert all(pod["template"]["spec"]["containers"] for pod in pods)
    assert all("groupName" in group for group in cluster["workerGroupSpecs"])
    wanted = yaml.safe_load((PROJECT / config).read_text())["workers"]
    (group,) = cluster["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert int(resources["limits"]["nvidia.com/gpu"]) * group["replicas"] == wanted["count"] * wanted["gpus"]
    assert int(resources["requests"]["cpu"]) * group["replicas"] >= wanted["count"] * wanted["cpus"]


def test_the_cron_job() -> None:
    job = manifest("finetune-cronjob.yaml")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "CronJob")
    assert len(job["spec"]["schedule"].split()) == 5
    pod = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    words = pod["containers"][0]["args"][0].split()
    assert words[:2] == ["latents", "finetune"]
    command: Any = typer.main.get_command(app)
    assert words[2] in command.commands
    assert (PROJECT / words[4]).is_file()
    with pytest.raises(SystemExit) as end:
        command([*words[2:], "--help"], standalone_mode=True)
    assert end.value.code == 0
