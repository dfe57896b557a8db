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
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, cast

import ray
import ray.data
import torch
from pydantic import TypeAdapter
from ray.data import ActorPoolStrategy
from ray.exceptions import RayError

from pipeline.checkpoints import VAESource, load_source
from pipeline.decode import DecodePool
from pipeline.documents import Document, ShardReceipt
from pipeline.encoder import TileEncoder, make_deterministic
from pipeline.errors import ConfigError, PipelineError, ShardError
from pipeline.policies import EncodePolicy
from pipeline.records import VideoShard
from pipeline.scratch import Scratch
from pipeline.shard import ShardEncoder, ShardJob

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


class ShardDone(Document):
    """A row that came back: a stored shard whose receipt is to be written."""

    shard_id: str
    receipt: ShardReceipt
    seconds: dict[str, float]
    """Per stage."""


class ShardPoisoned(Document):
    """A row that came back: a shard that ended its actor too often."""

    shard_id: str
    attempts: int


_SHARD = TypeAdapter(VideoShard)
_OUTCOME: TypeAdapter[ShardDone | ShardPoisoned] = TypeAdapter(ShardDone | ShardPoisoned)


class RunMonitor:
    """A small actor beside the driver: attempts per shard and how far each encoder is."""

    def __init__(self) -> None:
        self._begun: dict[str, int] = {}
        self._progress: dict[str, dict[str, float]] = {}

    def attempts(self, shard_id: str) -> int:
        """How often the shard was begun without an end."""
        return self._begun.get(shard_id, 0)

    def begin(self, shard_id: str) -> None:
        self._begun[shard_id] = self._begun.get(shard_id, 0) + 1

    def end(self, shard_id: str) -> None:
        self._begun.pop(shard_id, None)

    def report(self, encoder_id: str, figures: dict[str, float]) -> None:
        self._progress[encoder_id] = figures

    def progress(self) -> dict[str, dict[str, float]]:
        return self._progress


class EncodeShards:
    """The callable that Ray Data keeps in each actor: a VAE replica, its decode children, and the shard code."""

    def __init__(self, job: ShardJob, vae: VAESource, encode: EncodePolicy, shape: ActorShape, monitor: Any) -> None:
        device = torch.device("cuda" if shape.num_gpus else "cpu")
        make_deterministic(None if shape.num_gpus else shape.encode_threads)
        model = load_source(vae)
        if model.weights_sha256 != job.identity.weights_sha256:
            raise PipelineError(
                f"the VAE on this node has weights sha256 {model.weights_sha256}, "
                f"the run was planned with {job.identity.weights_sha256}"
            )
        self._tiles = TileEncoder(model, encode, device)
        self._pool = DecodePool(job.decode, shape.decode_children)
        self._encoder = ShardEncoder(job, self._tiles, self._pool, Scratch())
        self._gate = _AloneGate()
        self._monitor = monitor
        self._max_attempts = shape.max_attempts
        threading.Thread(target=self._report_for_ever, name="progress", daemon=True).start()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return {"outcome": [self._run(_SHARD.validate_json(row)).model_dump_json() for row in batch["shard"]]}

    def _run(self, shard: VideoShard) -> ShardDone | ShardPoisoned:
        before = cast(int, ray.get(self._monitor.attempts.remote(shard.id)))
        if before >= self._max_attempts:
            return ShardPoisoned(shard_id=shard.id, attempts=before)
        with self._gate.enter(alone=before > 0):
            ray.get(self._monitor.begin.remote(shard.id))
            try:
                outcome = self._encoder.run(shard)
            except ShardError:
                raise
            except Exception as error:
                # a shard's failure must say which shard; the cause follows it to the driver
                raise ShardError(shard.id, f"{shard.url}: {type(error).__name__}: {error}") from error
            ray.get(self._monitor.end.remote(shard.id))
        return ShardDone(shard_id=shard.id, receipt=outcome.receipt, seconds=outcome.seconds)

    def _report_for_ever(self) -> None:
        encoder_id = ray.get_runtime_context().get_actor_id() or ""
        while True:
            time.sleep(PROGRESS_INTERVAL)
            self._monitor.report.remote(encoder_id, {**asdict(self._tiles.clock)})


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


def require_room(shape: ActorShape, nodes: list[dict[str, float]]) -> None:
    """ConfigError unless some node can hold an actor, which would otherwise wait for ever."""
    for node in nodes:
        if node.get("CPU", 0.0) >= shape.num_cpus and node.get("GPU", 0.0) >= shape.num_gpus:
            return
    have = ", ".join(f"{node.get('CPU', 0):g} CPU and {node.get('GPU', 0):g} GPU" for node in nodes) or "no node"
    raise ConfigError(
        f"cluster: an encode actor needs {shape.num_cpus:g} CPU and {shape.num_gpus:g} GPU on one node; "
        f"the cluster has {have}. Lower cluster.decode_children or cluster.gpus_per_actor."
    )


def encode_shards(
    shards: list[VideoShard],
    job: ShardJob,
    vae: VAESource,
    encode: EncodePolicy,
    shape: ActorShape,
    *,
    on_progress: Callable[[dict[str, dict[str, float]]], None] | None = None,
) -> Iterator[ShardDone | ShardPoisoned]:
    """Encode and store the shards on the connected Ray cluster; yield each as it is done, in any order.

    Raises ShardError, with the shard's id, when a shard fails for a reason that trying again would not mend.
    """
    monitor = ray.remote(RunMonitor).options(num_cpus=0, max_concurrency=1).remote()
    rows = ray.data.from_items(
        [{"shard": _SHARD.dump_json(shard).decode()} for shard in shards], override_num_blocks=len(shards)
    )
    outcomes = rows.map_batches(
        cast(Any, EncodeShards),
        batch_size=1,
        num_gpus=shape.num_gpus or None,
        num_cpus=shape.num_cpus,
        compute=ActorPoolStrategy(
            size=shape.num_actors,
            max_tasks_in_flight_per_actor=2 * CALLS_PER_ACTOR,
            max_concurrent_calls_per_actor=CALLS_PER_ACTOR,
            enable_true_multi_threading=True,
        ),
        fn_constructor_args=(job, vae, encode, shape, monitor),
    )
    with _polling(monitor, on_progress):
        try:
            for row in outcomes.iter_rows():
                yield _OUTCOME.validate_json(row["outcome"])
        except RayError as error:
            raise _root_cause(error) from error


def _root_cause(error: BaseException) -> BaseException:
    """The project's own error inside Ray's wrapping, or the error itself."""
    seen: BaseException | None = error
    while seen is not None:
        cause = getattr(seen, "cause", None)
        if isinstance(seen, PipelineError):
            return seen
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    return error


@contextmanager
def _polling(monitor: Any, on_progress: Callable[[dict[str, dict[str, float]]], None] | None) -> Iterator[None]:
    """Call back with the encoders' figures every few seconds while rows are awaited."""
    leaving = threading.Event()

    def poll() -> None:
        while on_progress is not None and not leaving.wait(PROGRESS_INTERVAL):
            try:
                on_progress(cast("dict[str, dict[str, float]]", ray.get(monitor.progress.remote(), timeout=10)))
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
