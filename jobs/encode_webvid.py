"""Encode video shards into latent shards.

    ray job submit -- python jobs/encode_webvid.py configs/encode/webvid_256.yaml
    python jobs/encode_webvid.py configs/encode/demo.yaml --set output.url=data/other

Start it again after anything whatever: committed shards are skipped, and the finished dataset is the same.
`latents encode` is this same function.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.cluster import connected, decide_shape, node_resources
from jobs.config import EncodeConfig, load_config
from jobs.console import RunDisplay, report_errors
from pipeline.dataflow import encode_shards
from pipeline.documents import Manifest
from pipeline.run import EncodeSettings, RunLog, RunPlan, commit_all, finish_run, plan_run


def encode(
    config: Annotated[Path, typer.Argument(help="A YAML file such as configs/encode/demo.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting: section.setting=value (YAML).")
    ] = None,
) -> None:
    """Encode video shards into latent shards; start it again to resume."""
    with report_errors():
        run_encode(load_config(EncodeConfig, config, overrides or ()))


def run_encode(config: EncodeConfig) -> Manifest:
    """The whole job: plan, encode what has no receipt, write the manifest. Errors as `plan_run`, and ShardError."""
    settings = EncodeSettings(**{name: getattr(config, name) for name in EncodeSettings.model_fields})
    display = RunDisplay()
    display.starting(settings)
    plan = plan_run(settings, config.model_dump(mode="json"))
    display.planned(plan)
    log = RunLog()
    if plan.todo:
        _encode_todo(config, plan, log, display)
    manifest = finish_run(plan, log)
    display.finished(plan, manifest, log)
    return manifest


def _encode_todo(config: EncodeConfig, plan: RunPlan, log: RunLog, display: RunDisplay) -> None:
    outcome, cluster = "failed", {}
    try:
        with connected(config.cluster):
            shape = decide_shape(config.cluster, config.encode, node_resources(), len(plan.todo))
            cluster = asdict(shape)
            outcomes = encode_shards(
                list(plan.todo), plan.job(), config.vae, config.encode, shape, on_progress=display.progress
            )
            with display.encoding(plan, shape):
                poison = config.cluster.on_poison_shard == "set_aside"
                for receipt in commit_all(plan, outcomes, log, set_aside_poison=poison):
                    display.committed(receipt)
        outcome = "finished"
    finally:
        plan.dataset.write_run_report(log.run_id, log.report(cluster, outcome))


if __name__ == "__main__":
    typer.run(encode)
