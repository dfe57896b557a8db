"""`latents status` as a person types it, on a run that goes on and on one that has ended."""

from __future__ import annotations

import json
import time
from pathlib import Path

from typer.testing import CliRunner

from jobs.show_status import status
from pipeline.dataset import DatasetFolder, receipt_name
from pipeline.run_log import RunLog
from pipeline.storage import Store
from tests.pipeline.example_documents import receipt, run_file


def typed(*arguments: str) -> tuple[int, str]:
    import typer

    app = typer.Typer(add_completion=False)
    app.command()(status)
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "160"})
    return result.exit_code, result.output


def begun(folder: Path) -> tuple[Store, RunLog]:
    store = Store(str(folder))
    dataset, log = DatasetFolder(store), RunLog(started=time.time() - 60, shards_total=5)
    dataset.claim(run_file())
    for shard in ("00000", "00001"):
        store.replace(receipt_name(shard), receipt(shard).to_bytes())
        log.note(shard, {"encode": 12.0})
    dataset.write_run_report(log.run_id, log.pulse({"00002": 75.0}))
    return store, log


def test_what_a_person_sees(tmp_path: Path) -> None:
    begun(tmp_path)
    code, text = typed(str(tmp_path))
    assert code == 0
    for part in ("2 of 5 done, 3 left", "goes on", "rejected no_video", "2 (33.33% of samples)", "last receipt"):
        assert part in text
    assert "00002: 0:01:15" in text
    assert "00001: 12.0 s" in text


def test_watching_ends_with_the_run(tmp_path: Path) -> None:
    store, log = begun(tmp_path)
    DatasetFolder(store).write_run_report(log.run_id, log.report("failed"))
    code, text = typed(str(tmp_path), "--watch", "--json")
    assert code == 0
    (line,) = text.splitlines()
    look = json.loads(line)
    assert look["shards"] == {"total": 5, "done": 2, "left": 3}
    assert look["run"]["outcome"] == "failed"
    assert look["eta_seconds"] is None, "nothing goes on"
    assert look["rejections"] == {"no_video": 2}


def test_no_dataset_is_one_line(tmp_path: Path) -> None:
    code, text = typed(str(tmp_path))
    assert code == 1
    assert "run.json does not exist" in text.replace("\n", " ")
