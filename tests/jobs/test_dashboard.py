"""infra/grafana-dashboard.json: its queries name metrics that exist, and a real Prometheus answers each of them.

The second needs a `prometheus` (Debian's package of that name, or $PROMETHEUS) and is skipped without one.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.metrics import METRICS

DASHBOARD = Path(__file__).parents[2] / "infra" / "grafana-dashboard.json"
PROMETHEUS = os.environ.get("PROMETHEUS") or shutil.which("prometheus")
DATASET = "s3://bucket/latents"
DEADLINE_SECONDS = 150.0


def queries() -> dict[str, str]:
    """Title and legend of each query of the dashboard, and the query."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return {f"{p['title']}: {t['legendFormat']}": t["expr"] for p in panels for t in p["targets"]}


def test_queries_and_metrics_are_the_same_set() -> None:
    named = set(re.findall(r"ray_(latents_\w+)", " ".join(queries().values())))
    assert named == {metric.name for metric in METRICS.values()}
    assert all("$dataset" in query for query in queries().values())


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len({(place["x"], place["y"]) for place in places}) == len(places)
    ids = [panel["id"] for panel in json.loads(DASHBOARD.read_text())["panels"]]
    assert len(set(ids)) == len(ids)


def grown(seconds: float) -> dict[str, float]:
    """Figures of an encoder after so many seconds: three quarters encoding, one quarter waiting for decoders."""
    return {
        "window_frames": 170 * seconds,
        "tiles": 9 * seconds,
        "filler_tiles": seconds,
        "state.encode": 0.75 * seconds,
        "state.decode": 0.25 * seconds,
        "shards": 0.1 * seconds,
        "samples": 10 * seconds,
        "payload_bytes": 1e6 * seconds,
        "clip_bytes": 2e6 * seconds,
        "rejections.timeout": 1 * seconds,
        "rejections.upstream_failed": 5 * seconds,
        "retries.decode_child": 0.2 * seconds,
        "clips_waiting": 3,
        "windows_waiting": 2,
        "decode_children": 4,
        "remote_decoders": 3,
        "remote_clips": 2 * seconds,
        "gpu_bytes.allocated": 5e9,
        "frames": 200 * seconds,  # no metric: passed over
    }


class _Publisher:
    """An actor that exports as an encode actor does."""

    def __init__(self) -> None:
        from pipeline.metrics import MetricsExport

        self._export = MetricsExport(DATASET, "encoder-1")
        self._started = time.monotonic()

    def publish(self) -> None:
        self._export.publish(grown(time.monotonic() - self._started))


@pytest.fixture
def prometheus(ray_cluster: str, tmp_path: Path) -> Iterator[str]:
    """The URL of a Prometheus that scrapes the test cluster's node."""
    import ray

    assert PROMETHEUS is not None
    (node,) = ray.nodes()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    target = f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    (tmp_path / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": "1s"},
                "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [target]}]}],
            }
        )
    )
    command = [PROMETHEUS, f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'data'}"]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=log)
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        process.wait(timeout=20)


def ask(url: str, query: str) -> list[dict[str, Any]]:
    """The series that a query gives now; none while Prometheus is not up."""
    try:
        with urllib.request.urlopen(f"{url}/api/v1/query?{urllib.parse.urlencode({'query': query})}") as reply:
            return json.load(reply)["data"]["result"]
    except (ConnectionError, urllib.error.URLError):
        return []


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="no prometheus here (Debian's package, or $PROMETHEUS)")
def test_a_real_prometheus_answers_every_query(prometheus: str) -> None:
    import ray

    publisher = ray.remote(_Publisher).options(num_cpus=0).remote()
    wanted = {
        name: query.replace("$dataset", ".*").replace("$__rate_interval", "2m") for name, query in queries().items()
    }
    answers: dict[str, list[dict[str, Any]]] = {}
    deadline = time.monotonic() + DEADLINE_SECONDS
    while wanted.keys() - answers.keys() and time.monotonic() < deadline:
        ray.get(publisher.publish.remote())
        time.sleep(1)
        found = {name: ask(prometheus, query) for name, query in wanted.items() if name not in answers}
        answers |= {name: series for name, series in found.items() if series and all(map(_is_number, series))}
    assert sorted(wanted.keys() - answers.keys()) == []
    states = {one["metric"]["state"]: float(one["value"][1]) for one in _answer(answers, "What encoders do")}
    assert states == pytest.approx({"encode": 0.75, "decode": 0.25}, abs=0.01)
    (rejected,) = _answer(answers, "Rejected share")
    assert float(rejected["value"][1]) == pytest.approx(0.1, rel=0.05)
    (filler,) = _answer(answers, "Filler")
    assert float(filler["value"][1]) == pytest.approx(0.1, rel=0.05)


def _is_number(series: dict[str, Any]) -> bool:
    """Rates of two scrapes between which nothing was published are 0, and a share of them is NaN."""
    return not math.isnan(float(series["value"][1]))


def _answer(answers: dict[str, list[dict[str, Any]]], title: str) -> list[dict[str, Any]]:
    return next(series for name, series in answers.items() if name.startswith(title))
