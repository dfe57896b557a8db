"""What it costs to decode on another node: local decode children against remote ones, in turns.

    python jobs/bench_remote_decode.py --rounds 5

Starts a Ray of two raylets on this machine: one for the pools, and one that lends cores to remote decode children,
which come to them as they come to an encode actor. Nothing is encoded, so that decoding is all there is to wait for.
A round decodes a clip in every place, one after the other; windows of 17 frames at 256 x 256, all of a clip's frames.
Both raylets have the same cores: the ratio is the price of the way over TCP, not what more nodes bring. Processor
time is that of the pool, the children and Ray's workers between them.
"""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated

if __name__ == "__main__":  # a script's own folder comes first on its import path; the project's must
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import psutil
import ray
import typer
from ray.cluster_utils import Cluster

from jobs.bench_decode import decode_in_pool, measure
from jobs.bench_report import BenchTable, machine, ratio_text
from jobs.cluster import LOOPBACK
from jobs.real_clips import fetch_real_clips
from pipeline.decode.pool import DecodePool
from pipeline.errors import PipelineError
from pipeline.policies import DecodePolicy
from pipeline.remote_decode import RemoteDecoders, RemoteShape, node_address

PROJECT = Path(__file__).resolve().parents[1]
CLIPS = ("carphone_pristine.mp4", "bikes.mp4", "bigbuckbunny.mp4")
POLICY = DecodePolicy(backends=("pyav",))
RESOURCE = "decode"
DECODE_NODE = "127.0.0.3"
STORE_BYTES = 100 << 20
JOIN_SECONDS = 180.0


def bench_remote_decode(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.01, help="About how long one measurement takes.")] = 1.0,
    children: Annotated[int, typer.Option(min=1, help="Decode children in each place.")] = 2,
    clip: Annotated[list[str] | None, typer.Option(help=f"Default: {', '.join(CLIPS)}.")] = None,
) -> None:
    """Frames per second of decode children here and on another raylet."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        raise typer.Exit(_again_with_a_token())
    print(machine())
    videos = {name: path.read_bytes() for name, path in fetch_real_clips().items() if name in (clip or CLIPS)}
    table = BenchTable(
        f"decode to 256 x 256, pyav, {children} children, frames/s, median of {rounds} rounds",
        ("clip", "local", "remote", "remote / local", "processor time, remote / local"),
    )
    with two_raylets(children), ExitStack() as stack:
        places = [Place(stack.enter_context(DecodePool(POLICY, children))), Place(_remote_pool(children, stack))]
        for name, video in sorted(videos.items()):
            local, remote = measure(video, tuple(places), rounds, seconds)
            spent = [place.processor_seconds[-rounds:] for place in places]
            table.add(
                *(name, f"{median(local):.0f}", f"{median(remote):.0f}"),
                *(ratio_text(remote, local), ratio_text(spent[1], spent[0])),
            )
    print(table)


@dataclass(slots=True)
class Place:
    """A pool, and what each call to decode with it took."""

    pool: DecodePool
    processor_seconds: list[float] = field(default_factory=list)

    def __call__(self, video: bytes, copies: int) -> float:
        """Frames/s of so many copies of the video."""
        before = _processor_seconds()
        rate = decode_in_pool(self.pool, video, copies)
        self.processor_seconds.append(_processor_seconds() - before)
        return rate


def _again_with_a_token() -> int:
    """Run this command once more, and let nobody else into its Ray, whose servers listen on every address. Ray reads
    how to authenticate as it is imported, hence the process."""
    with tempfile.TemporaryDirectory(prefix="ray-token-") as folder:
        token = Path(folder) / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0"}
        return subprocess.run([sys.executable, *sys.argv], env={**os.environ, **ours}, check=False).returncode


@contextmanager
def two_raylets(cores: int) -> Iterator[None]:
    """A Ray on loopback addresses: this process's node without cores, and one that lends some; left at the end."""
    # a Unix socket's path may have 107 bytes, so not wherever $TMPDIR points
    with tempfile.TemporaryDirectory(prefix="ray-bench-", ignore_cleanup_errors=True) as folder:
        path = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(path)  # where Ray's workers find the packages, installed or not
        head = {"num_cpus": 0, "node_ip_address": LOOPBACK, "include_dashboard": False, "temp_dir": folder}
        cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES})
        try:
            cluster.add_node(
                num_cpus=cores,
                resources={RESOURCE: cores},
                node_ip_address=DECODE_NODE,
                object_store_memory=STORE_BYTES,
            )
            ray.init(address=cluster.address, _node_ip_address=LOOPBACK, logging_level=logging.WARNING)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def _remote_pool(children: int, stack: ExitStack) -> DecodePool:
    """A pool whose children are all on the other node, and there. PipelineError if they do not come."""
    pool = stack.enter_context(DecodePool(POLICY, 0, num_remote=children, host=node_address()))
    assert pool.invitation is not None, "a pool with remote children has a door"
    shape = RemoteShape(number=children, num_cpus=POLICY.threads, resource=RESOURCE)
    decoders = RemoteDecoders(pool.invitation, shape, lambda: pool.remote_children)
    stack.callback(decoders.close)
    deadline = time.monotonic() + JOIN_SECONDS
    while pool.remote_children < children:
        if time.monotonic() > deadline:
            raise PipelineError(f"only {pool.remote_children} of {children} remote children came in")
        time.sleep(0.1)
    return pool


def _processor_seconds() -> float:
    """Of this process, all decode children, and the workers that stand between."""
    total = time.process_time()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline())
            if "pipeline.decode.child" in command or "decode-elsewhere" in command:
                times = process.cpu_times()
                total += times.user + times.system
    return total


if __name__ == "__main__":
    typer.run(bench_remote_decode)
