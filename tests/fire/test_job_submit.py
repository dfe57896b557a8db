"""`ray job submit` against a running head, as a user does it: working directory uploaded, token, exit codes."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipeline.storage import Store
from pipeline.verify import verify_dataset

PROJECT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
DEADLINE = 240


@dataclass(frozen=True)
class Head:
    address: str
    environment: dict[str, str]

    def submit(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RAY, "job", "submit", "--address", self.address, "--working-dir", ".", "--", *arguments]
        deadline = time.monotonic() + DEADLINE
        while True:
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=PROJECT,
                capture_output=True,
                text=True,
                timeout=DEADLINE,
                check=False,
            )
            # the head's dashboard answers before its agent can take a job
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                return done


@pytest.fixture(scope="module")
def head(ray_environment: dict[str, str]) -> Iterator[Head]:
    """infra/README.md's head on an address of its own; the environment's python is first on PATH, as it says."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ray_environment
    environment["PATH"] = f"{RAY.parent}{os.pathsep}{environment['PATH']}"
    del environment["PYTHONPATH"]  # the uploaded working directory must do
    port, agent_port = _free_port(), _free_port()
    with tempfile.TemporaryDirectory(prefix="head-", ignore_cleanup_errors=True) as folder:
        command = [RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.30", "--port=0", "--num-cpus=4"]
        command += ["--dashboard-host=127.0.0.1", f"--dashboard-port={port}", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent_port}", "--object-store-memory=100000000"]
        command += ["--disable-usage-stats"]
        with (Path(folder) / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            _wait_for(port, process, Path(folder) / "log")
            yield Head(f"http://127.0.0.1:{port}", environment)
        finally:
            _end_with_children(process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.2)


def _end_with_children(process: subprocess.Popen[bytes]) -> None:
    started = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    for child in started:
        with suppress(psutil.NoSuchProcess):
            child.kill()
    psutil.wait_procs(started, timeout=30)


@pytest.mark.timeout(3 * DEADLINE)
def test_a_job_from_the_projects_folder(head: Head, v2d_shards: Callable[..., list[Path]], tmp_path: Path) -> None:
    (tar,) = v2d_shards(tmp_path / "source", num_shards=1, good=2, failed=1, broken=1)
    job = ["python", "jobs/encode_webvid.py", "configs/encode/demo.yaml", "--set", f"source.urls={tar}"]
    job += ["--set", "resize.buckets=[[32,32]]", "--set", "cluster.decode_children=1"]

    lost = head.submit(*job, "--set", "output.url=relative/latents")
    assert lost.returncode == 1, lost.stdout + lost.stderr
    assert re.search(r"error: ConfigError: output\.url: .*deleted after the job", lost.stdout + lost.stderr)

    done = head.submit(*job, "--set", f"output.url={tmp_path / 'out'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "clips encoded" in done.stdout
    report = verify_dataset(Store(str(tmp_path / "out")))
    assert report.problems == []
    assert report.shards == 1
    assert report.windows >= 2
