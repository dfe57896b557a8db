"""Encode video shards into latent shards.

    ray job submit -- python jobs/encode_webvid.py configs/encode/webvid_256.yaml
    python jobs/encode_webvid.py configs/encode/demo.yaml --set output.url=data/other

Start it again after anything whatever: committed shards are skipped, and the finished dataset is the same.
`latents encode` is this same function.
"""

from __future__ import annotations

import logging
import sys
import time
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
from pipeline.dataset import DatasetFolder
from pipeline.documents import Manifest
from pipeline.error_budget import BudgetMeter
from pipeline.errors import ErrorBudgetExceeded, PipelineError
from pipeline.event_log import LogFormat, log_receipt, set_up_log
from pipeline.planning.compare import compare, read_plan
from pipeline.run import RunPlan, commit_all, finish_run, plan_run
from pipeline.run_log import BEAT_SECONDS, RunLog
from pipeline.run_monitor import RunProgress
from pipeline.stall_watch import StallWatch


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
    set_up_log(log_format_of(config))
    display, log = RunDisplay(), RunLog()
    require_lasting_output(config.output.url)
    display.starting(config)
    plan = plan_run(config, config.model_dump(mode="json"))
    display.planned(plan)
    log.shards_total, log.committed_before = len(plan.shards), len(plan.shards) - len(plan.todo)
    outcome, keeper = "failed", ReportKeeper(plan.dataset, log)
    try:
        if plan.todo:
            with connected(config.cluster):
                shape = decide_shape(config.cluster, config.encode, node_resources(), len(plan.todo))
                log.cluster = asdict(shape)
                keeper.beat(RunProgress())
                _encode_todo(config, plan, shape, log, display, keeper)
        manifest = finish_run(plan, log)
        outcome = "finished"
        log.plan_against_actual = _against_plan(plan, manifest, log, display)
    except ErrorBudgetExceeded:
        outcome = "stopped by error_budget"
        raise
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C; SIGTERM, which Ray turns into an exit
        outcome = "stopped"
        display.stopped(plan, len(log.finished_at))
        raise
    finally:
        keeper.keep(log.report(outcome))
    display.finished(plan, manifest, log)
    if manifest.counts.samples and not manifest.counts.windows_stored:
        raise PipelineError("nothing was encoded: every sample was rejected. The receipts say why, clip by clip.")
    return manifest


def _encode_todo(
    config: EncodeConfig, plan: RunPlan, shape: ActorShape, log: RunLog, display: RunDisplay, keeper: ReportKeeper
) -> None:
    stalls, budget = StallWatch(config.log.stalled_seconds), BudgetMeter(config.error_budget)

    def look(progress: RunProgress) -> None:
        display.progress(progress.figures)
        stalls.look(progress)
        keeper.beat(progress)

    outcomes = encode_shards(
        list(plan.todo),
        plan.job(),
        config.vae,
        config.encode,
        shape,
        on_progress=look,
        log_format=log_format_of(config),
    )
    set_aside = config.cluster.on_poison_shard == "set_aside"
    with closing(outcomes), display.encoding(plan, shape):
        for receipt in commit_all(plan, outcomes, log, set_aside_poison=set_aside):
            display.committed(receipt)
            log_receipt(receipt)
            budget.spend(receipt)


def log_format_of(config: EncodeConfig) -> LogFormat:
    """The config's, with auto decided."""
    if config.log.format == "auto":
        return "none" if sys.stderr.isatty() else "key_value"
    return config.log.format


def _against_plan(plan: RunPlan, manifest: Manifest, log: RunLog, display: RunDisplay) -> list[dict[str, Any]]:
    """What was planned beside what came; nothing without a plan, or with one of other work."""
    try:
        planned = read_plan(plan.dataset, plan.run_file.fingerprint)
    except (PipelineError, OSError) as error:
        logging.getLogger(__name__).warning("the plan is not compared: %s", error)
        return []
    compared = compare(planned, manifest, log) if planned is not None else []
    display.compared(compared)
    return [one.record() for one in compared]


class ReportKeeper:
    """Writes runs/ID.json: a pulse while the run goes on, the whole report at its end. It is worth a warning, not the
    run, and never takes the place of the run's own error."""

    def __init__(self, dataset: DatasetFolder, log: RunLog) -> None:
        self._dataset = dataset
        self._log = log
        self._due = time.monotonic()

    def beat(self, progress: RunProgress) -> None:
        """Write the pulse if the last one is old enough."""
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + BEAT_SECONDS
            self.keep(self._log.pulse({shard: under_way.seconds for shard, under_way in progress.under_way.items()}))

    def keep(self, report: dict[str, Any]) -> None:
        try:
            self._dataset.write_run_report(self._log.run_id, report)
        except (PipelineError, OSError) as error:
            logging.getLogger(__name__).warning("no run report: %s", error)


if __name__ == "__main__":
    typer.run(encode)
