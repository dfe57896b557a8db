"""Connect to a Ray cluster, or start one on this machine, and cut it into encode actors."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
from ray.exceptions import RayError

from jobs.config import ClusterConfig
from pipeline.dataflow import ActorShape, require_room
from pipeline.errors import ConfigError, PipelineError
from pipeline.policies import EncodePolicy

LOOPBACK = "127.0.0.2"
"""Ray replaces 127.0.0.1 by the network card's address; any other loopback address it keeps."""
CORES_PER_CPU_ACTOR = 8
MAX_DECODE_CHILDREN = 16
CONNECT_SECONDS = 10


@contextmanager
def connected(config: ClusterConfig) -> Iterator[None]:
    """A connection to the configured cluster, $RAY_ADDRESS, or a local Ray that nothing outside can reach.

    A Ray that was connected before is used and left as it was.
    """
    if ray.is_initialized():
        _quiet_data(config)
        yield
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    if address:
        _connect(address)
    else:
        _start_local()
    try:
        _quiet_data(config)
        yield
    finally:
        ray.shutdown()


def _start_local() -> None:
    options: dict[str, Any] = {"_node_ip_address": LOOPBACK} if sys.platform == "linux" else {}
    # "local": a Ray that somebody started on this machine is not to be joined by accident
    try:
        ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray has no narrower one for processes of its own that do not come up
        raise PipelineError(
            f"Ray does not start on this machine: {error} Start the same command again once the machine has less to "
            "do, or name a Ray that runs in cluster.address."
        ) from error


def _connect(address: str) -> None:
    """ConfigError if nothing answers there; Ray itself would go on trying for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    try:
        if host and port.isdecimal():
            socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
        ray.init(address=address, logging_level=logging.WARNING)
    except (OSError, RuntimeError, ValueError, RayError) as error:
        raise ConfigError(
            f"cluster.address: cannot connect to Ray at {address!r}: {error}. If it asks for a token, set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to a file with the head's token before the start"
        ) from error


def _quiet_data(config: ClusterConfig) -> None:
    """Ray Data says what the run's own progress says better; a stuck run must end, not wait for ever."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_no_progress_timeout_s = int(config.shard_timeout_minutes * 60)
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def require_lasting_output(url: str) -> None:
    """ConfigError if the output would lie in the folder that Ray unpacks a submitted job into and then deletes."""
    package = re.match(r".*/working_dir_files/_ray_pkg_[^/]+", str(Path.cwd()))
    if package and url.startswith(package[0]):
        raise ConfigError(
            f"output.url: {url} lies in the folder that Ray unpacked this job into, which is deleted after the job; "
            "expected an absolute path on storage that all nodes share, or a URL such as s3://bucket/latents"
        )


def node_resources() -> list[dict[str, float]]:
    """CPU, GPU and memory of every living node."""
    return [dict(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def decide_shape(
    config: ClusterConfig, encode: EncodePolicy, nodes: list[dict[str, float]], num_shards: int
) -> ActorShape:
    """How many encode actors of what size: what the config says, else one per GPU, else one per eight cores.

    ConfigError if no node has room for one.
    """
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus_per_actor = config.gpus_per_actor if config.gpus_per_actor is not None else (1.0 if gpus else 0.0)
    asked = config.decode_children
    if gpus_per_actor:
        # per node, since an actor has its share of one; the margin is for shares such as 0.2: 1 // 0.2 is 4
        fitting = sum(int(node.get("GPU", 0.0) / gpus_per_actor + 1e-6) for node in nodes)
        num_actors = config.num_actors or max(1, fitting)
        cores = min((n.get("CPU", 0.0) * gpus_per_actor / n["GPU"] for n in nodes if n.get("GPU")), default=1.0)
        children = min(MAX_DECODE_CHILDREN, max(1, int(cores) - 1)) if asked is None else asked
        # a node with fewer than two cores per actor shares them rather than leave GPUs idle
        threads, reserved = 1, min(cores, 1.0 + children) if asked is None else 1.0 + children
    else:
        num_actors = config.num_actors or max(1, int(cpus // CORES_PER_CPU_ACTOR))
        cores = max(1.0, min(cpus / num_actors, max((n.get("CPU", 1.0) for n in nodes), default=1.0)))
        children = max(1, int(cores) // 4) if asked is None else asked
        # decoding is a small share of the work without a GPU, so few cores are shared rather than split
        threads = encode.threads or max(1, int(cores) - (children if cores > 2 else 0))
        reserved = float(int(cores))  # all that it uses, or Ray would put two on one node
    shape = ActorShape(
        num_actors=max(1, min(num_actors, num_shards)),
        num_gpus=gpus_per_actor,
        decode_children=children,
        encode_threads=threads,
        num_cpus=reserved,
        max_attempts=config.max_attempts,
        remote_decoders=config.remote_decoders,
        remote_decode_resource=config.remote_decode_resource,
    )
    require_room(shape, nodes)
    return shape
