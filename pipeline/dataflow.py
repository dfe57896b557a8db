"""The Ray part: shards as rows of a Ray Data dataset, an actor pool that owns them, attempts that are counted.

A row is a shard (Ray costs 17 to 20 ms per task; anything finer would be thousands of tasks a second at 1,000
GPUs). Ray Data schedules, scales and restarts actors; payloads touch neither the driver nor the object store. Two
calls overlap in an actor, so that one shard decodes while the one before it uploads.

A shard that keeps ending its actor would be restarted for ever. The `RunMonitor` counts attempts: one that was
begun before is run alone in its actor, so that a neighbour's crash is not held against it, and one that was begun
`max_attempts` times without coming to an end is given back as poison instead of being run again.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Protocol, cast

import ray
import ray.data
import torch
from pydantic import TypeAdapter
from ray.data import ActorPoolStrategy
from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.checkpoints import VAESource, load_source
from pipeline.decode.pool import DecodePool
from pipeline.encoder import TileEncoder
from pipeline.errors import ConfigError, PipelineError, ShardError
from pipeline.event_log import LogFormat, set_up_log
from pipeline.metrics import MetricsExport
from pipeline.policies import DecodePolicy, EncodePolicy
from pipeline.records import VideoShard, printable
from pipeline.remote_decode import RemoteDecoders, RemoteShape, node_address
from pipeline.run_monitor import Figures, RunMonitor, RunProgress
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardFailed, ShardJob, ShardOutcome, ShardPoisoned, ShardStored

log = logging.getLogger(__name__)

PROGRESS_INTERVAL = 2.0
CALLS_PER_ACTOR = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorShape:
    """What each encode actor asks of the cluster, and how many there are."""

    num_actors: int
    num_gpus: float
    decode_children: int
    encode_threads: int
    """CPU threads of the VAE when it has no GPU."""
    num_cpus: float
    """Cores that Ray reserves for one actor."""
    max_attempts: int = 3
    remote_decoders: int = 0
    """Decode children of each actor on other nodes."""
    remote_decode_resource: str = "decode"
    """The custom resource that lends them a core each."""


_SHARD = TypeAdapter(VideoShard)
_OUTCOME: TypeAdapter[ShardOutcome] = TypeAdapter(ShardOutcome)


class ShardRunner(Protocol):
    """What an actor does with its shards."""

    def run(self, shard: VideoShard) -> ShardStored:
        """Encode and store one shard; called by `CALLS_PER_ACTOR` threads at a time."""
        ...

    def figures(self) -> dict[str, float]:
        """How far it is, for the run's progress."""
        ...


class _Replica:
    """A VAE replica, its decode children, and the shard code."""

    def __init__(
        self, job: ShardJob, vae: VAESource, encode: EncodePolicy, shape: ActorShape, log_format: LogFormat
    ) -> None:
        set_up_log(log_format)
        model = load_source(vae)
        if model.weights_sha256 != job.identity.weights_sha256:
            raise PipelineError(
                f"the VAE on this node has weights sha256 {model.weights_sha256}, "
                f"the run was planned with {job.identity.weights_sha256}"
            )
        device = torch.device("cuda" if shape.num_gpus else "cpu")
        self._tiles = TileEncoder(model, encode, device, threads=None if shape.num_gpus else shape.encode_threads)
        self._pool = DecodePool(
            job.decode, shape.decode_children, num_remote=shape.remote_decoders, host=node_address()
        )
        if self._pool.invitation is not None:
            self._remote = RemoteDecoders(
                self._pool.invitation, remote_shape(shape, job.decode), lambda: self._pool.remote_children
            )
        self._encoder = ShardEncoder(job, self._tiles, self._pool, Scratch())
        self._metrics = MetricsExport(job.store.full_url(""), ray.get_runtime_context().get_actor_id() or "")

    def run(self, shard: VideoShard) -> ShardStored:
        return self._encoder.run(shard)

    def figures(self) -> dict[str, float]:
        figures = figures_of(self._tiles, self._pool)
        self._metrics.publish(figures)
        return figures


def figures_of(tiles: TileEncoder, pool: DecodePool) -> Figures:
    """What an encoder did up to now, and what waits for it, by name."""
    clips, windows = pool.depth()
    return {
        **asdict(tiles.clock),
        **tiles.activity.figures(),
        **tiles.device_memory(),
        "clips_waiting": clips,
        "windows_waiting": windows,
        "decode_children": len(pool.child_pids()) + pool.remote_children,
        "remote_decoders": pool.remote_children,
        "remote_clips": pool.remote_clips,
        "retries.decode_child": pool.children_replaced,
    }


def remote_shape(shape: ActorShape, policy: DecodePolicy) -> RemoteShape:
    """What one actor's remote decode children ask of the cluster."""
    resource = shape.remote_decode_resource
    return RemoteShape(number=shape.remote_decoders, num_cpus=policy.threads, resource=resource)


class EncodeShards:
    """The callable that Ray Data keeps in each actor: a runner that `set_up` makes there, and attempts that count.

    What goes wrong with a shard, or with setting up, is returned as a ShardFailed: an exception would reach the
    driver without its type and with Ray's own advice.
    """

    def __init__(self, set_up: Callable[[], ShardRunner], max_attempts: int, monitor: Any) -> None:
        self._monitor = monitor
        self._max_attempts = max_attempts
        self._encoder_id = ray.get_runtime_context().get_actor_id() or ""
        self._gate = _AloneGate()
        self._runner: ShardRunner | str
        try:
            self._runner = set_up()
            threading.Thread(target=self._report_for_ever, args=(self._runner,), name="progress", daemon=True).start()
        except Exception as error:  # the actor's boundary: the first shard it gets brings this to the driver
            log.exception("an encoder cannot be set up")
            self._runner = f"an encoder cannot be set up: {_said(error)}"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": [self._run(_SHARD.validate_json(row)) for row in batch["shard"]]}

    def _run(self, shard: VideoShard) -> str:
        """The outcome as JSON."""
        try:
            return self._attempt(shard).model_dump_json()
        except Exception as error:  # the shard's boundary: its name and the reason go to the driver
            if not isinstance(error, PipelineError):  # ours say all there is to say
                log.exception("shard failed: shard=%s", shard.id)
            return ShardFailed(shard_id=shard.id, error=_said(error)).model_dump_json()

    def _attempt(self, shard: VideoShard) -> ShardOutcome:
        if isinstance(self._runner, str):
            return ShardFailed(shard_id=shard.id, error=self._runner)
        before = cast(int, ray.get(self._monitor.attempts.remote(shard.id)))
        if before >= self._max_attempts:
            return ShardPoisoned(shard_id=shard.id, poison_attempts=before)
        with self._gate.enter(alone=before > 0):
            ray.get(self._monitor.begin.remote(shard.id, self._encoder_id))
            outcome = self._runner.run(shard)
            ray.get(self._monitor.end.remote(shard.id))
        return outcome

    def _report_for_ever(self, runner: ShardRunner) -> None:
        while True:
            time.sleep(PROGRESS_INTERVAL)
            self._monitor.report.remote(self._encoder_id, runner.figures())


def _said(error: Exception) -> str:
    """The project's own errors speak for themselves; others need their type."""
    if isinstance(error, ShardError):
        return error.message
    return printable(str(error) if isinstance(error, PipelineError) else f"{type(error).__name__}: {error}")


class _AloneGate:
    """Many may be inside, or one alone."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._inside = 0
        self._alone = False

    @contextmanager
    def enter(self, *, alone: bool) -> Iterator[None]:
        with self._condition:
            self._condition.wait_for(lambda: not self._alone and (self._inside == 0 or not alone))
            self._inside += 1
            self._alone = alone
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._alone = False
                self._condition.notify_all()


def actors_that_fit(shape: ActorShape, nodes: list[dict[str, float]]) -> int:
    """How many actors of this shape the living nodes hold together; an actor does not span nodes."""
    total = 0
    for node in nodes:
        by_cpu = node.get("CPU", 0.0) / shape.num_cpus
        by_gpu = node.get("GPU", 0.0) / shape.num_gpus if shape.num_gpus else by_cpu
        total += int(min(by_cpu, by_gpu) + 1e-6)  # the margin is for shares such as 0.2
    return total


def require_room(shape: ActorShape, nodes: list[dict[str, float]]) -> None:
    """ConfigError unless some node can hold an actor, which would otherwise wait for ever. A warning if not all fit:
    the others start when the cluster grows."""
    fitting = actors_that_fit(shape, nodes)
    if fitting == 0:
        have = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes) or "no node"
        raise ConfigError(
            f"cluster: an encode actor needs {shape.num_cpus:g} CPU and {shape.num_gpus:g} GPU on one node; "
            f"the cluster has {have}. Lower cluster.decode_children or cluster.gpus_per_actor."
        )
    if fitting < shape.num_actors:
        log.warning("only some encode actors fit now: fitting=%d wanted=%d", fitting, shape.num_actors)
    lent = sum(node.get(shape.remote_decode_resource, 0.0) for node in nodes)
    if lent < (wanted := shape.remote_decoders * shape.num_actors):
        log.warning(
            "only some remote decoders have room now: lent=%g wanted=%d. A node lends its cores with "
            "--resources '{\"%s\": CORES}' at its start",
            *(lent, wanted, shape.remote_decode_resource),
        )


def encode_shards(
    shards: list[VideoShard],
    job: ShardJob,
    vae: VAESource,
    encode: EncodePolicy,
    shape: ActorShape,
    *,
    on_progress: Callable[[RunProgress], None] | None = None,
    log_format: LogFormat = "none",
) -> Generator[ShardOutcome, None, None]:
    """Encode and store the shards on the connected Ray cluster; yield each outcome as it comes, in any order.

    Close the generator before the connection. PipelineError if Ray gives up: nothing came back for too long, or it
    lost what it cannot restart.
    """
    set_up = partial(_Replica, job, vae, encode, shape, log_format)
    return run_shards(shards, set_up, shape, on_progress=on_progress)


def run_shards(
    shards: list[VideoShard],
    set_up: Callable[[], ShardRunner],
    shape: ActorShape,
    *,
    on_progress: Callable[[RunProgress], None] | None = None,
) -> Generator[ShardOutcome, None, None]:
    """`encode_shards` with any runner: each actor calls `set_up`, which must pickle, once."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    monitor = ray.remote(RunMonitor).options(num_cpus=0, scheduling_strategy=here).remote()
    # No more than run at once: a shard that waits in one actor's queue cannot go to one that is free. No more than
    # its share either: of few shards, the first actors to come up would take all. (To wait until all are up is no way
    # out: one that was to start on a node that is lost would be waited for in vain.)
    share = math.ceil(len(shards) / shape.num_actors)
    items = [{"shard": _SHARD.dump_json(shard).decode()} for shard in shards]
    rows = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        cast(Any, EncodeShards),
        batch_size=1,
        num_gpus=shape.num_gpus or None,
        num_cpus=shape.num_cpus,
        compute=ActorPoolStrategy(
            size=shape.num_actors,
            max_tasks_in_flight_per_actor=min(CALLS_PER_ACTOR, share),
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(set_up, shape.max_attempts, monitor),
    )
    with _polling(monitor, on_progress):
        try:
            # nothing prefetched: every outcome, and so its receipt, would be held back until the next one is there
            for batch in rows.iter_batches(batch_size=None, prefetch_batches=0):
                yield from (_OUTCOME.validate_json(outcome) for outcome in batch["outcome"])
        except (RayError, ExecutionTimeoutError) as error:
            last = str(error).strip().splitlines()[-1:] or [type(error).__name__]
            raise PipelineError(
                f"Ray ended the run: {type(error).__name__}: {last[0]}. Committed shards stay; start the run again. "
                "(cluster.shard_timeout_minutes bounds how long nothing may come back.)"
            ) from error


@contextmanager
def _polling(monitor: Any, on_progress: Callable[[RunProgress], None] | None) -> Iterator[None]:
    """Call back with the encoders' figures every few seconds while rows are awaited."""
    leaving = threading.Event()

    def poll() -> None:
        while on_progress is not None and not leaving.wait(PROGRESS_INTERVAL):
            try:
                on_progress(cast(RunProgress, ray.get(monitor.progress.remote(), timeout=10)))
            except RayError as error:
                log.warning("no progress figures: %s", error)

    thread = threading.Thread(target=poll, name="progress-poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        leaving.set()
        thread.join(timeout=15)
        ray.kill(monitor)
