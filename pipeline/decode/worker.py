"""A thread of the pool and the child it owns."""

from __future__ import annotations

import logging
import math
import selectors
import socket
import threading
from collections import deque
from contextlib import suppress

from pipeline.decode.clips import ClipSummary, DecodedWindow
from pipeline.decode.supervisor import POLL_SECONDS, ChildDied, DecodeChild, Limits
from pipeline.decode.task import ClipTask, Ended, Failed, Given, Voided
from pipeline.errors import ClipError, PipelineError, RejectionClass
from pipeline.policies import DecodePolicy

logger = logging.getLogger(__name__)

_ATTEMPTS = 2


class TaskQueue:
    """First come, first served; shared by the pool's threads."""

    def __init__(self) -> None:
        self._tasks: deque[ClipTask] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, task: ClipTask) -> None:
        with self._changed:
            if not self._closed:
                self._tasks.append(task)
                self._changed.notify()
                return
        _fail(task, PipelineError("the decode pool is closed"))

    def get(self) -> ClipTask | None:
        """The oldest task; blocks. None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._tasks or self._closed)
            return None if self._closed else self._tasks.popleft()

    def __len__(self) -> int:
        """Tasks that nobody serves yet."""
        with self._changed:
            return len(self._tasks)

    @property
    def is_closed(self) -> bool:
        with self._changed:
            return self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            waiting, self._tasks = self._tasks, deque()
            self._changed.notify_all()
        for task in waiting:
            _fail(task, PipelineError("the decode pool is closed"))


class PoolWorker:
    """Serves one task at a time with a child of its own. The child is started, used and ended in the thread."""

    def __init__(self, queue: TaskQueue, policy: DecodePolicy, *, name: str) -> None:
        self._queue = queue
        self._policy = policy
        self._child: DecodeChild | None = None
        self.replaced = 0
        """How often its child had to be ended, or died."""
        self._started = threading.Event()
        self._decoders: dict[str, str | None] = {}
        self._start_error: Exception | None = None
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        # A daemon, so that a pool nobody closed does not keep the interpreter from ending; its child ends with it.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_started(self) -> dict[str, str | None]:
        """Block until the first child answers: the version of each decoder it can import. PipelineError if none."""
        self._started.wait()
        if self._start_error is not None:
            raise self._start_error
        return self._decoders

    @property
    def child_pid(self) -> int | None:
        child = self._child
        return child.pid if child is not None and child.is_alive else None

    def close(self) -> None:
        """After the queue's close: wait for the thread to end its child and itself."""
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._wake_reader.close()
        self._wake_writer.close()

    def _wake(self) -> None:
        with suppress(OSError):  # a full pipe wakes as well, and behind a closed one nobody sleeps
            self._wake_writer.send(b"!")

    def _run(self) -> None:
        try:
            self._decoders = self._living_child().decoders
        except (PipelineError, OSError) as error:
            self._start_error = error
        finally:
            self._started.set()
        while (task := self._queue.get()) is not None:
            try:
                if task.begin(self._wake):
                    self._serve(task)
            # The thread's boundary: what ends a task must reach the thread that waits for it, or it waits for ever.
            except Exception as error:  # noqa: BLE001
                self._end_child()
                task.put(Failed(error))
            finally:
                task.release()
        self._end_child()

    def _serve(self, task: ClipTask) -> None:
        """Put the task's items up to its end. A child that must be killed, or dies, is replaced, and the clip is
        tried once more: the new child gives the same items again, and those that were put before are passed over,
        so that who reads them sees nothing of it."""
        sequence = _Sequence(task)
        for attempt in range(1, _ATTEMPTS + 1):
            sequence.restart()
            refused = self._attempt(task, sequence)
            if refused is None:
                return
            self.replaced += 1
            logger.warning(
                "decode child replaced: clip=%s shard=%s attempt=%d why=%s",
                *(task.clip.key, task.clip.shard_id, attempt, refused),
            )
            self._end_child()
            if attempt == _ATTEMPTS:
                message = f"{refused.message} ({_ATTEMPTS} attempts)"
                task.put(Ended(None, ClipError(refused.error_class, refused.stage, message)))

    def _attempt(self, task: ClipTask, sequence: _Sequence) -> ClipError | None:
        """Why the child must be replaced, if it must. Its own words are logged, not stored: they hold addresses."""
        try:
            self._decode(task, sequence, self._living_child())
        except ClipError as error:
            return error
        except ChildDied as died:
            logger.warning("decode child died: clip=%s end=%s", task.clip.key, died)
            return ClipError(RejectionClass.DECODER_CRASHED, "decode", "the decode child died")
        return None

    def _decode(self, task: ClipTask, sequence: _Sequence, child: DecodeChild) -> None:
        """One attempt. ClipError for a limit, ChildDied, PipelineError when the pool is closed meanwhile."""
        acknowledged = 0
        child.send_job(task.job, task.clip.video)
        limits = Limits(child, self._policy)
        with selectors.DefaultSelector() as selector:
            child.register(selector)
            selector.register(self._wake_reader, selectors.EVENT_READ, "wake")
            while True:
                ready = {key.data: key.fileobj for key, _ in selector.select(POLL_SECONDS)}
                if "wake" in ready:
                    self._wake_reader.recv(4096)
                if "stderr" in ready and not child.drain_stderr():
                    selector.unregister(ready["stderr"])
                if "message" in ready:
                    item = _item(child)
                    limits.progressed()
                    sequence.put(item)
                    if isinstance(item, Ended):
                        return
                if self._queue.is_closed:
                    raise PipelineError("the decode pool is closed")
                if task.is_cancelled:
                    self._end_child()
                    return
                for _ in range(sequence.windows_given - task.windows_waiting - acknowledged):
                    child.send_ack(task.job)
                    acknowledged += 1
                limits.check(waits_for_us=sequence.windows_given - acknowledged >= task.job.windows_in_flight)

    def _living_child(self) -> DecodeChild:
        """The child, a new one if it has ended while idle. PipelineError if none can be started."""
        if self._child is not None and not self._child.is_alive:
            self._end_child()
        if self._child is None:
            self._child = _started_child()
        return self._child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()


def _started_child() -> DecodeChild:
    """PipelineError if two do not start: one may be killed as it starts, as it may be later."""
    try:
        return DecodeChild()
    except PipelineError as error:
        logger.warning("decode child started once more: why=%s", error)
        return DecodeChild()


class _Sequence:
    """A clip's items over all attempts, each put once."""

    def __init__(self, task: ClipTask) -> None:
        self._task = task
        self._put = 0
        self.restart()

    def restart(self) -> None:
        """A new child begins from the clip's start."""
        self._seen = 0
        self.windows_given = 0
        """By this child, those passed over included."""

    def put(self, item: Given | Voided | Ended) -> None:
        self._seen += 1
        self.windows_given += isinstance(item, Given)
        if self._seen > self._put:
            self._put = self._seen
            self._task.put(item)
        elif isinstance(item, Given):
            item.window.pixels.close()


def _item(child: DecodeChild) -> Given | Voided | Ended:
    """The child's next message as a task's item. ChildDied if it makes no sense."""
    message, blob = child.receive()
    match message:
        case {"type": "window", "window": dict(fields)} if blob is not None:
            window = DecodedWindow.from_message(fields, blob)
            if blob.size != math.prod(window.shape) * 3:
                raise ChildDied(f"a window of shape {window.shape} came with {blob.size} bytes")
            return Given(window)
        case {"type": "retract"}:
            return Voided()
        case {"type": "done", "summary": dict(summary)}:
            return Ended(ClipSummary(**summary))
        case {"type": "rejected", "error_class": error_class, "stage": stage, "message": text}:
            return Ended(None, ClipError(RejectionClass(error_class), stage, text))
    raise ChildDied(f"it sent {message.get('type')!r}")


def _fail(task: ClipTask, error: PipelineError) -> None:
    task.put(Failed(error))
    task.release()
