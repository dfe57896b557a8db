"""A thread of the pool and the child it owns."""

from __future__ import annotations

import logging
import math
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress

from pipeline.decode.clips import ClipSummary, DecodedWindow
from pipeline.decode.supervisor import POLL_SECONDS, Child, ChildDied, DecodeChild, Limits
from pipeline.decode.task import ClipTask, Ended, Failed, Given, Item, Voided
from pipeline.errors import ClipError, PipelineError, RejectionClass
from pipeline.policies import DecodePolicy

logger = logging.getLogger(__name__)

_ATTEMPTS = 2


class TaskQueue:
    """First come, first served; shared by the pool's threads. Tasks to be served again go before new ones."""

    def __init__(self) -> None:
        self._new: deque[ClipTask] = deque()
        self._again: deque[ClipTask] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def put(self, task: ClipTask) -> None:
        self._append(self._new, task)

    def put_again(self, task: ClipTask) -> None:
        """A task that a worker took and did not end."""
        self._append(self._again, task)

    def _append(self, tasks: deque[ClipTask], task: ClipTask) -> None:
        with self._changed:
            if not self._closed:
                tasks.append(task)
                self._changed.notify_all()
                return
        fail(task, PipelineError("the decode pool is closed"))

    def get(self) -> ClipTask | None:
        """The oldest task that is to be served again, or else the oldest; blocks. None once closed."""
        return self._take(self._again, self._new)

    def get_new(self) -> ClipTask | None:
        """The same of tasks that nobody has served yet."""
        return self._take(self._new)

    def get_again(self) -> ClipTask | None:
        """The same of tasks that are to be served again."""
        return self._take(self._again)

    def _take(self, *lanes: deque[ClipTask]) -> ClipTask | None:
        with self._changed:
            self._changed.wait_for(lambda: any(lanes) or self._closed)
            return None if self._closed else next(lane for lane in lanes if lane).popleft()

    def __len__(self) -> int:
        """Tasks that nobody serves now."""
        with self._changed:
            return len(self._new) + len(self._again)

    @property
    def is_closed(self) -> bool:
        with self._changed:
            return self._closed

    def close(self) -> None:
        with self._changed:
            self._closed = True
            waiting = [*self._again, *self._new]
            self._again.clear()
            self._new.clear()
            self._changed.notify_all()
        for task in waiting:
            fail(task, PipelineError("the decode pool is closed"))


class PoolWorker:
    """Serves one task at a time with a child of its own. The child is started, used and ended in the thread.

    A child that must be killed, or dies, is replaced, and its clip is put back to be tried once more by whoever takes
    it: the other child gives the same items again, and those that were put before are passed over, so that who reads
    them sees nothing of it.
    """

    def __init__(
        self,
        queue: TaskQueue,
        policy: DecodePolicy,
        *,
        take: Callable[[], ClipTask | None],
        start_child: Callable[[], Child | None],
        name: str,
    ) -> None:
        """`take` is one of the queue's; `start_child` may wait for one, and gives None if there will be none."""
        self._queue = queue
        self._policy = policy
        self._take = take
        self._start_child = start_child
        self._child: Child | None = None
        self.replaced = 0
        """How often its child had to be ended over a clip, or died."""
        self.served = 0
        """Clips that came to their end here."""
        self._first: Future[dict[str, str | None]] = Future()
        self._wake_reader, self._wake_writer = socket.socketpair()
        self._wake_reader.setblocking(False)
        self._wake_writer.setblocking(False)
        # A daemon, so that a pool nobody closed does not keep the interpreter from ending; its child ends with it.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def wait_started(self) -> dict[str, str | None]:
        """Block until the first child answers: the version of each decoder it can import. PipelineError if none."""
        return self._first.result()

    @property
    def has_child(self) -> bool:
        child = self._child
        return child is not None and child.is_alive

    @property
    def child_pid(self) -> int | None:
        """None without one, and where it runs on another node."""
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
        while (child := self._ready()) is not None and (task := self._take()) is not None:
            if isinstance(child, Exception):
                fail(task, child)
            elif child.is_alive:
                self._serve(task, child)
            else:  # it has ended while idle
                self._queue.put_again(task)
        self._end_child()

    def _ready(self) -> Child | Exception | None:
        """A living child, or why there is none; None once the pool is closed."""
        if self._queue.is_closed:
            return None
        try:
            child = self._living_child()
        except (PipelineError, OSError) as error:
            if not self._first.done():
                self._first.set_exception(error)
            return error
        if child is not None and not self._first.done():
            self._first.set_result(child.decoders)
        return child

    def _serve(self, task: ClipTask, child: Child) -> None:
        """Put the task's items up to its end, or put it back."""
        # The thread's boundary: what ends a task must reach the thread that waits for it, or it waits for ever.
        try:
            if not task.begin(self._wake):
                task.release()
                return
            refused = self._attempt(task, child)
            if refused is None:
                task.release()
            else:
                self._end_child()
                self._refuse(task, refused)
        except Exception as error:  # noqa: BLE001
            self._end_child()
            fail(task, error)

    def _refuse(self, task: ClipTask, refused: ClipError) -> None:
        """End a task whose last attempt this was; another is put back."""
        self.replaced += 1
        task.attempts += 1
        logger.warning(
            "decode child replaced: clip=%s shard=%s attempt=%d why=%s",
            *(task.clip.key, task.clip.shard_id, task.attempts, refused),
        )
        if task.attempts < _ATTEMPTS:
            task.pause()
            self._queue.put_again(task)
            return
        message = f"{refused.message} ({_ATTEMPTS} attempts)"
        task.put(Ended(None, ClipError(refused.error_class, refused.stage, message)))
        task.release()

    def _attempt(self, task: ClipTask, child: Child) -> ClipError | None:
        """Why the child must be replaced, if it must. Its own words are logged, not stored: they hold addresses."""
        try:
            self._decode(task, child)
        except ClipError as error:
            return error
        except ChildDied as died:
            logger.warning("decode child died: clip=%s end=%s", task.clip.key, died)
            return ClipError(RejectionClass.DECODER_CRASHED, "decode", "the decode child died")
        return None

    def _decode(self, task: ClipTask, child: Child) -> None:
        """One attempt. ClipError for a limit, ChildDied, PipelineError when the pool is closed meanwhile."""
        sequence = _Sequence(task)
        acknowledged = 0
        child.send(task.job.to_message(), task.clip.video)
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
                if "message" in ready and (item := _item(child)) is not None:
                    limits.progressed()
                    self.served += isinstance(item, Ended)
                    sequence.put(item)
                    if isinstance(item, Ended):
                        return
                if self._queue.is_closed:
                    raise PipelineError("the decode pool is closed")
                if task.is_cancelled:
                    self._end_child()
                    return
                for _ in range(sequence.windows_given - task.windows_waiting - acknowledged):
                    child.send(task.job.ack())
                    acknowledged += 1
                limits.check(waits_for_us=sequence.windows_given - acknowledged >= task.job.windows_in_flight)

    def _living_child(self) -> Child | None:
        """The child, a new one if it has ended. PipelineError if none can be started, None if none will be."""
        if self._child is not None and not self._child.is_alive:
            self._end_child()
        if self._child is None:
            self._child = self._start_child()
        return self._child

    def _end_child(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()


def local_child() -> DecodeChild:
    """PipelineError if two do not start: one may be killed as it starts, as it may be later."""
    try:
        return DecodeChild()
    except PipelineError as error:
        logger.warning("decode child started once more: why=%s", error)
        return DecodeChild()


def fail(task: ClipTask, error: Exception) -> None:
    """Not the clip's fault; who waits for it hears of it."""
    task.put(Failed(error))
    task.release()


class _Sequence:
    """A clip's items from one attempt; those that an attempt before has put are passed over."""

    def __init__(self, task: ClipTask) -> None:
        self._task = task
        self._seen = 0
        self.windows_given = 0
        """By this child, those passed over included."""

    def put(self, item: Item) -> None:
        self._seen += 1
        self.windows_given += isinstance(item, Given)
        if self._seen > self._task.items_put:
            self._task.put(item)
        elif isinstance(item, Given):
            item.window.pixels.close()


def _item(child: Child) -> Given | Voided | Ended | None:
    """The child's next message as a task's item; None for a sign of life. ChildDied if it makes no sense."""
    received = child.receive()
    if received is None:
        return None
    message, blob = received
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
