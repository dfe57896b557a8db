"""A decode child seen from its parent: started, measured, killed."""

from __future__ import annotations

import os
import selectors
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil

from pipeline.decode.blob import Blob
from pipeline.decode.wire import Channel, Message
from pipeline.errors import ClipError, PipelineError, RejectionClass
from pipeline.policies import DecodePolicy

POLL_SECONDS = 0.2
WALL_PER_CPU_SECOND = 10
_START_SECONDS = 120.0
_STDERR_BYTES = 4000
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class ChildDied(Exception):
    """The child ended by itself, or said what no child says. Caught by the pool."""


class Child(Protocol):
    """A decode child as its worker sees it, wherever it runs. Of one thread, but for `pid` and `is_alive`."""

    @property
    def pid(self) -> int | None:
        """None on another node."""
        ...

    @property
    def is_alive(self) -> bool: ...

    @property
    def decoders(self) -> dict[str, str | None]:
        """The version of each decoder it can import."""
        ...

    def register(self, selector: selectors.BaseSelector) -> None:
        """Watch for "message" (`receive`) and, if it has one here, for "stderr" (`drain_stderr`)."""
        ...

    def send(self, message: Message, blob: Blob | None = None) -> None:
        """ChildDied if it cannot be reached. The blob stays the caller's."""
        ...

    def receive(self) -> tuple[Message, Blob | None] | None:
        """The next message, or None for a mere sign of life. ChildDied if there will be none."""
        ...

    def drain_stderr(self) -> bool:
        """False at the end."""
        ...

    def cpu_seconds(self) -> float:
        """Processor time up to now."""
        ...

    def private_bytes(self) -> int:
        """Resident memory that is its alone."""
        ...

    def kill(self) -> None:
        """End it now; safe to call twice."""
        ...


class DecodeChild:
    """A running child process. Start, use and end it in one thread: the child dies with the thread that starts it."""

    def __init__(self) -> None:
        """PipelineError with the child's own words if it does not start."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "pipeline.decode.child", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(),),
                env=child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        self._stderr = bytearray()
        self._usage = psutil.Process(self._process.pid)
        self._channel = Channel(ours)
        self.decoders = self._await_ready(ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process.poll() is None

    def register(self, selector: selectors.BaseSelector) -> None:
        """Watch for messages (`receive`) and for words on stderr (`drain_stderr`)."""
        selector.register(self._channel, selectors.EVENT_READ, "message")
        selector.register(self._stderr_fd, selectors.EVENT_READ, "stderr")

    def send(self, message: Message, blob: Blob | None = None) -> None:
        """ChildDied if it is gone. The blob stays the caller's."""
        try:
            self._channel.send(message, blob)
        except OSError as error:
            raise ChildDied(self._last_words()) from error

    def receive(self) -> tuple[Message, Blob | None]:
        """The next message. ChildDied if there will be none."""
        try:
            return self._channel.receive()
        except (EOFError, OSError, ValueError) as error:
            raise ChildDied(self._last_words()) from error

    def drain_stderr(self) -> bool:
        """Keep the last of what the child says, so that it never blocks on a full pipe. False at the end."""
        try:
            words = os.read(self._stderr_fd, 1 << 16)
        except BlockingIOError:
            return True
        self._stderr = (self._stderr + words)[-_STDERR_BYTES:]
        return bool(words)

    def cpu_seconds(self) -> float:
        times = self._usage.cpu_times()
        return times.user + times.system

    def private_bytes(self) -> int:
        """Resident memory that is the child's alone: windows and clips, which are shared, do not count."""
        memory = self._usage.memory_info()
        return memory.rss - getattr(memory, "shared", 0)

    def kill(self) -> None:
        """End it now; safe to call twice."""
        self._process.kill()
        self._process.wait()
        self._channel.close()
        if self._process.stderr is not None:
            self._process.stderr.close()

    @property
    def _stderr_fd(self) -> int:
        assert self._process.stderr is not None
        return self._process.stderr.fileno()

    def _await_ready(self, connection: socket.socket) -> dict[str, str | None]:
        connection.settimeout(_START_SECONDS)
        try:
            message, _ = self._channel.receive()
        except (EOFError, OSError) as error:
            words = self._last_words()
            self.kill()
            raise PipelineError(f"a decode child does not start: {words}") from error
        connection.settimeout(None)
        return message["decoders"]

    def _last_words(self) -> str:
        """How it ended, with the end of its stderr."""
        try:
            code = self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it does not answer"
        while self.drain_stderr():
            pass
        ended = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"{ended}: {self._stderr.decode(errors='replace').strip() or 'nothing on stderr'}"


class Limits:
    """What a child may spend on a clip between two signs of progress. Asked often, it looks every POLL_SECONDS."""

    def __init__(self, child: Child, policy: DecodePolicy) -> None:
        self._child = child
        self._policy = policy
        self._looked = time.monotonic()
        self._cpu = 0.0
        self.progressed()

    def progressed(self) -> None:
        """A window or an end has come."""
        self._wall = time.monotonic()
        with suppress(psutil.NoSuchProcess):  # it has just died: its channel says so next
            self._cpu = self._child.cpu_seconds()

    def check(self, *, waits_for_us: bool) -> None:
        """ClipError TIMEOUT or OUT_OF_MEMORY. The wall clock stands still while the child waits for an ack.

        Messages hold no measured number: receipts must not differ between runs.
        """
        now = time.monotonic()
        if waits_for_us:
            self._wall = now
        if now - self._looked >= POLL_SECONDS:
            self._looked = now
            with suppress(psutil.NoSuchProcess):
                self._look()

    def _look(self) -> None:
        allowed = self._policy.cpu_seconds
        wall = WALL_PER_CPU_SECOND * allowed
        if self._child.cpu_seconds() - self._cpu > allowed or time.monotonic() - self._wall > wall:
            message = f"no window and no end within {allowed:g} s of CPU time or {wall:g} s"
            raise ClipError(RejectionClass.TIMEOUT, "decode", message)
        if self._child.private_bytes() > self._policy.memory_mb << 20:
            message = f"the decode child needs more than {self._policy.memory_mb} MB"
            raise ClipError(RejectionClass.OUT_OF_MEMORY, "decode", message)


def child_environment() -> dict[str, str]:
    """Ours, with our import path: the child finds the same packages wherever it runs."""
    path = [str(Path(entry).absolute()) for entry in sys.path]
    threads = dict.fromkeys(_ONE_THREAD, "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(path)}
