"""Encode video shards into latent shards.

    ray job submit -- python jobs/encode_webvid.py configs/encode/webvid_256.yaml
    python jobs/encode_webvid.py configs/encode/demo.yaml --set output.url=data/other

Start it again after anything whatever: committed shards are skipped, and the finished dataset is the same.
`latents encode` is this same function.
"""

from __future__ import annotations

import logging
import sys
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from jobs.cluster import connected, decide_shape, node_resources, require_lasting_output
from jobs.config import EncodeConfig, load_config
from jobs.console import RunDisplay
from jobs.messages import report_errors
from pipeline.dataflow import ActorShape, encode_shards
from pipeline.documents import Manifest
from pipeline.errors import PipelineError
from pipeline.run import RunLog, RunPlan, commit_all, finish_run, plan_run


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
    display, log = RunDisplay(), RunLog()
    require_lasting_output(config.output.url)
    display.starting(config)
    plan = plan_run(config, config.model_dump(mode="json"))
    display.planned(plan)
    outcome, cluster = "failed", {}
    try:
        if plan.todo:
            with connected(config.cluster):
                shape = decide_shape(config.cluster, config.encode, node_resources(), len(plan.todo))
                cluster = asdict(shape)
                _encode_todo(config, plan, shape, log, display)
        manifest = finish_run(plan, log)
        outcome = "finished"
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C; SIGTERM, which Ray turns into an exit
        outcome = "stopped"
        display.stopped(plan, len(log.finished_at))
        raise
    finally:
        _keep_report(plan, log.report(cluster, outcome))
    display.finished(plan, manifest, log)
    if manifest.counts.samples and not manifest.counts.windows_stored:
        raise PipelineError("nothing was encoded: every sample was rejected. The receipts say why, clip by clip.")
    return manifest


def _encode_todo(config: EncodeConfig, plan: RunPlan, shape: ActorShape, log: RunLog, display: RunDisplay) -> None:
    outcomes = encode_shards(
        list(plan.todo), plan.job(), config.vae, config.encode, shape, on_progress=display.progress
    )
    set_aside = config.cluster.on_poison_shard == "set_aside"
    with closing(outcomes), display.encoding(plan, shape):
        for receipt in commit_all(plan, outcomes, log, set_aside_poison=set_aside):
            display.committed(receipt)


def _keep_report(plan: RunPlan, report: dict[str, Any]) -> None:
    """The report is worth a warning, not the run, and never takes the place of the run's own error."""
    try:
        plan.dataset.write_run_report(str(report["run_id"]), report)
    except (PipelineError, OSError) as error:
        logging.getLogger(__name__).warning("no run report: %s", error)


if __name__ == "__main__":
    typer.run(encode)
