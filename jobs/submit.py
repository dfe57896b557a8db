"""Send a job to a cluster's job API, follow it, wait for it, send it again by name.

A name stands for one run: its submissions are NAME-1, NAME-2, ..., of which one at most is alive. Resuming sends the
same command again; the run itself knows where it was. Ray forgets its jobs with its head: then submit anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from pipeline.errors import ConfigError, PipelineError

PROJECT = Path(__file__).resolve().parents[1]
NAME_KEY = "latents_run"
POLL_SECONDS = 2.0
DEFAULT_ADDRESS = "http://127.0.0.1:8265"
EXCLUDES = (".git", ".venv", "data", "tests/golden")
Answer = TypeVar("Answer")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,48}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class Submission:
    """A job that a cluster has taken."""

    name: str
    id: str
    address: str

    def status(self) -> JobStatus:
        """PipelineError if the cluster does not answer or has forgotten it."""
        return _asked(lambda: _client(self.address).get_job_status(self.id), self.address)

    def wait(self, timeout_seconds: float | None = None, *, patience_seconds: float = 0.0) -> JobStatus:
        """Block until it has ended; TimeoutError if it has not after so long, PipelineError if the cluster has not
        answered for longer than `patience_seconds`."""
        started = answered = time.monotonic()
        while True:
            try:
                status = self.status()
            except PipelineError:
                if time.monotonic() - answered > patience_seconds:
                    raise
            else:
                answered = time.monotonic()
                if status.is_terminal():
                    return status
                if timeout_seconds is not None and answered - started > timeout_seconds:
                    raise TimeoutError(f"job {self.id} is {status.value} after {timeout_seconds:g} s")
            time.sleep(POLL_SECONDS)

    def follow(self, write: Callable[[str], object] = sys.stdout.write) -> JobStatus:
        """Pass on its log, from the start, until it ends; how it ended."""
        client = _client(self.address)

        async def tail() -> None:
            async for lines in client.tail_job_logs(self.id):
                write(lines)

        _asked(lambda: asyncio.run(tail()), self.address)
        return self.wait()


def submit_finetune(
    config: str | Path,
    *,
    name: str,
    address: str | None = None,
    overrides: Sequence[str] = (),
    working_dir: Path = PROJECT,
    environment: Mapping[str, str] | None = None,
) -> Submission:
    """Send `jobs/finetune_vae.py CONFIG` to a cluster and return at once.

    `config` is a path inside `working_dir`, which is uploaded. `address`: the job API's, else
    $RAY_API_SERVER_ADDRESS, else the local one. ConfigError if the name is taken by a job that has not ended, or
    the config is outside.
    """
    path = Path(config)
    relative = path.resolve().relative_to(working_dir.resolve()) if _is_inside(path, working_dir) else None
    if relative is None or not path.is_file():
        raise ConfigError(f"config {path}: expected a file inside the folder that is uploaded, {working_dir}")
    arguments = [f"--set={override}" for override in overrides]
    command = shlex.join(["python", "jobs/finetune_vae.py", relative.as_posix(), *arguments])
    return _send(name, command, address, working_dir, environment or {})


def resume(name: str, *, address: str | None = None, working_dir: Path = PROJECT) -> Submission:
    """Send the last submission of this name again. ConfigError if there is none, or it has not ended."""
    latest = find(name, address=address)
    details = _details(latest)
    environment = (details.runtime_env or {}).get("env_vars", {})
    return _send(name, details.entrypoint, address, working_dir, environment)


def find(name: str, *, address: str | None = None) -> Submission:
    """The last submission of this name. ConfigError if the cluster knows none."""
    url = _address(address)
    jobs = _of_name(url, name)
    if not jobs:
        raise ConfigError(f"no job named {name!r} at {url}: Ray forgets jobs with its head; submit it again")
    return Submission(name, jobs[-1].submission_id or "", url)


def _send(
    name: str, command: str, address: str | None, working_dir: Path, environment: Mapping[str, str]
) -> Submission:
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"name: expected up to 50 of a-z, 0-9 and '-', a letter or digit at both ends, got {name!r}"
        )
    url = _address(address)
    before = _of_name(url, name)
    alive = [job for job in before if not job.status.is_terminal()]
    if alive:
        raise ConfigError(f"job {alive[-1].submission_id} is {alive[-1].status.value}: stop or follow it first")
    submission_id = f"{name}-{len(before) + 1}"
    runtime_env = {"working_dir": str(working_dir), "excludes": list(EXCLUDES), "env_vars": dict(environment)}
    _asked(
        lambda: _client(url).submit_job(
            entrypoint=command,
            submission_id=submission_id,
            runtime_env=runtime_env,
            metadata={NAME_KEY: name},
        ),
        url,
    )
    return Submission(name, submission_id, url)


def _of_name(url: str, name: str) -> list[JobDetails]:
    """Its submissions, oldest first."""
    jobs = _asked(lambda: _client(url).list_jobs(), url)
    named = [job for job in jobs if (job.metadata or {}).get(NAME_KEY) == name and job.submission_id]
    return sorted(named, key=lambda job: int(str(job.submission_id).rpartition("-")[2]))


def _details(submission: Submission) -> JobDetails:
    return _asked(lambda: _client(submission.address).get_job_info(submission.id), submission.address)


def _address(address: str | None) -> str:
    return address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS


def _client(url: str) -> JobSubmissionClient:
    return JobSubmissionClient(url)


def _asked(ask: Callable[[], Answer], url: str) -> Answer:
    """PipelineError, with what to do about it, if the cluster does not answer or refuses."""
    try:
        return ask()
    except (RuntimeError, ConnectionError, ValueError) as error:
        raise PipelineError(
            f"{url}: {error}. If it asks for a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with "
            "the head's token"
        ) from error


def _is_inside(path: Path, folder: Path) -> bool:
    return path.resolve().is_relative_to(folder.resolve())
