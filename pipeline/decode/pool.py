"""Clips in, windows out, decoded by killable child processes.

A thread per child owns it for life (the kernel kills a child with the thread that started it), hands it one clip at
a time, watches what it spends and replaces it when it must. `decode` gives the events of its clips in clip order
however many children there are; several threads may call it at once and share the children.

Children on other nodes, which come in by a `Door`, take clips from the same queue. A clip that any child has failed
with is tried once more by a child of this machine, so that a node that is lost costs time, and no clip.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from pipeline.decode.clips import ClipSummary
from pipeline.decode.door import Door
from pipeline.decode.link import Invitation
from pipeline.decode.task import ClipTask, Ended, Failed, Given, Voided
from pipeline.decode.wire import Job
from pipeline.decode.worker import PoolWorker, TaskQueue, local_child
from pipeline.errors import ConfigError
from pipeline.policies import BackendName, DecodePolicy, ResizePolicy, WindowPolicy
from pipeline.records import Clip, Rejection, Window
from pipeline.windows import check_window_length

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WindowReady:
    """The next window of a clip. Void if the clip is retracted later."""

    window: Window
    clip: Clip


@dataclass(frozen=True, slots=True)
class ClipRetracted:
    """The windows given so far for this clip are void: it is decoded again from its start, or is refused."""

    clip: Clip


@dataclass(frozen=True, slots=True)
class ClipDone:
    """A clip's end, exactly one per clip; its Blob is closed. Either `summary` or `rejection` is set. A clip with a
    rejection has no valid window: those given before were retracted."""

    clip: Clip
    summary: ClipSummary | None = None
    rejection: Rejection | None = None


DecodeEvent = WindowReady | ClipRetracted | ClipDone


@dataclass(slots=True)
class _LookAhead:
    """The clips of one `decode` call that are in the pool."""

    tasks: deque[ClipTask] = field(default_factory=deque)

    def abandon(self) -> None:
        """Free the children of what nobody waits for any more; return once no thread uses the clips."""
        for task in self.tasks:
            task.cancel()
        for task in self.tasks:
            task.wait_released()
            task.clip.video.close()


class DecodePool:
    """`num_children` decode processes, and `num_remote` more that others start elsewhere and send to its door. Close
    it, or use it as a context manager."""

    def __init__(
        self, policy: DecodePolicy, num_children: int, *, num_remote: int = 0, host: str = "127.0.0.1"
    ) -> None:
        """Starts the children. With remote ones there may be no other: then one is started that takes only what has
        failed before. `host` is this machine's address, as the other nodes see it.

        PipelineError if a child does not start, ConfigError if no backend is installed.
        """
        if num_children < 0 or num_remote < 0 or num_children + num_remote < 1:
            raise ConfigError(
                f"a decode pool needs at least 1 child, got {num_children} here, {num_remote} elsewhere"
            )
        self.policy = policy
        self._queue = TaskQueue()
        self._numbers = iter(range(1 << 62))
        self._lock = threading.Lock()
        self._in_work: set[ClipTask] = set()
        self._door: Door | None = None
        take = self._queue.get if num_children else self._queue.get_again
        self._workers = [
            PoolWorker(self._queue, policy, take=take, start_child=local_child, name=f"decode-{n}")
            for n in range(max(1, num_children))
        ]
        self._remote: list[PoolWorker] = []
        try:
            for worker in self._workers:
                worker.start()
            decoders = [worker.wait_started() for worker in self._workers][-1]
            self._backends = _installed(policy.backends, decoders)
            if num_remote:
                self._let_in(Door(host, decoders), num_remote)
        except BaseException:  # Ctrl-C too: no child may outlive the attempt
            self.close()
            raise
        self.decoders = tuple(str(decoders[name]) for name in self._backends)
        """The decoders in use with their versions, in the order they are tried: ("pyav-18.1.0", ...)."""

    def _let_in(self, door: Door, num_remote: int) -> None:
        self._door = door
        for n in range(num_remote):
            name = f"decode-remote-{n}"
            worker = PoolWorker(
                self._queue, self.policy, take=self._queue.get_new, start_child=door.next_child, name=name
            )
            self._remote.append(worker)
            worker.start()

    @property
    def invitation(self) -> Invitation | None:
        """What `pipeline.decode.relay.serve` needs on another node; None for a pool without remote children."""
        return self._door.invitation if self._door is not None else None

    def decode(
        self, clips: Iterator[Clip], windows: WindowPolicy, resize: ResizePolicy, lengths: tuple[int, ...]
    ) -> Generator[DecodeEvent, None, None]:
        """Events in clip order. At most a clip per child and one more are taken ahead; each clip's Blob is closed at
        its ClipDone, or when the iterator is closed. `lengths` are the VAE's, up to a window's: ConfigError if that
        is none of them."""
        check_window_length(windows, lengths)
        return self._decode(clips, windows, resize, lengths)

    def _decode(
        self, clips: Iterator[Clip], windows: WindowPolicy, resize: ResizePolicy, lengths: tuple[int, ...]
    ) -> Generator[DecodeEvent, None, None]:
        ahead = _LookAhead()
        clips = iter(clips)
        try:
            while True:
                while (
                    len(ahead.tasks) <= len(self._workers) + len(self._remote)
                    and (clip := next(clips, None)) is not None
                ):
                    ahead.tasks.append(self._task(clip, windows, resize, lengths))
                    self._queue.put(ahead.tasks[-1])
                if not ahead.tasks:
                    return
                yield from _events(ahead.tasks[0])
                self._forget(ahead.tasks.popleft())
        finally:
            self._forget(*ahead.tasks)
            ahead.abandon()

    def _task(self, clip: Clip, windows: WindowPolicy, resize: ResizePolicy, lengths: tuple[int, ...]) -> ClipTask:
        task = ClipTask(clip, self._job(windows, resize, lengths))
        with self._lock:
            self._in_work.add(task)
        return task

    def _forget(self, *tasks: ClipTask) -> None:
        with self._lock:
            self._in_work.difference_update(tasks)

    def depth(self) -> tuple[int, int]:
        """Clips that wait for a child, and decoded windows that wait to be taken."""
        with self._lock:
            tasks = list(self._in_work)
        return len(self._queue), sum(task.windows_waiting for task in tasks)

    @property
    def children_replaced(self) -> int:
        """How often a child was ended for a limit, or died, and was started anew."""
        return sum(worker.replaced for worker in [*self._workers, *self._remote])

    @property
    def remote_clips(self) -> int:
        """Clips that came to their end on other nodes."""
        return sum(worker.served for worker in self._remote)

    @property
    def remote_children(self) -> int:
        """How many of the children on other nodes are there now."""
        return sum(worker.has_child for worker in self._remote)

    def _job(self, windows: WindowPolicy, resize: ResizePolicy, lengths: tuple[int, ...]) -> Job:
        with self._lock:
            number = next(self._numbers)
        return Job(
            number=number,
            backends=self._backends,
            windows=windows,
            resize=resize,
            lengths=lengths,
            threads=self.policy.threads,
            windows_in_flight=self.policy.windows_in_flight,
        )

    def child_pids(self) -> list[int]:
        """Process ids of this machine's children that run now, for monitoring."""
        return [pid for worker in self._workers if (pid := worker.child_pid) is not None]

    def close(self) -> None:
        """End the children and their threads. A `decode` still running raises PipelineError."""
        self._queue.close()
        if self._door is not None:
            self._door.close()
        for worker in [*self._workers, *self._remote]:
            worker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _events(task: ClipTask) -> Iterator[DecodeEvent]:
    """One clip's events up to its end. Raises the pool's own failures (a child that does not start)."""
    clip = task.clip
    void = False  # whether windows were given that a retraction would take back
    while True:
        match task.take():
            case Given(decoded):
                void = True
                yield WindowReady(decoded.to_window(clip.key), clip)
            case Voided():
                if void:
                    void = False
                    yield ClipRetracted(clip)
            case Failed(error):
                raise error
            case Ended(summary, error):
                if error is not None and void:
                    yield ClipRetracted(clip)
                clip.video.close()
                if error is None:
                    yield ClipDone(clip, summary=summary)
                else:
                    rejection = Rejection.from_error(error, key=clip.key, shard_id=clip.shard_id)
                    yield ClipDone(clip, rejection=rejection)
                return


def _installed(backends: tuple[BackendName, ...], decoders: dict[str, str | None]) -> tuple[BackendName, ...]:
    """The wanted backends that the children have, in order; a warning for each that is missing."""
    present: tuple[BackendName, ...] = tuple(name for name in backends if decoders[name] is not None)
    if not present:
        names = ", ".join(backends)
        raise ConfigError(f"none of the decode backends {names} is installed (the extra 'encode' brings them)")
    for name in set(backends) - set(present):
        logger.warning("decode backend is not installed and is skipped: backend=%s", name)
    return present
