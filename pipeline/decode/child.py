"""The decode child: `python -m pipeline.decode.child SOCKET_FD PARENT_PID`.

It reads strangers' files with libraries that hang, crash and leak, so it is a process that can be killed. It imports
neither torch nor ray, has no state between clips, and dies with its parent.

    parent -> child   job (with the clip's Blob), ack (one window was taken)
    child -> parent   ready, window (with its Blob), retract, done, rejected
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Generator
from dataclasses import asdict
from typing import get_args

from pipeline.decode.blob import Blob
from pipeline.decode.clips import ClipSummary, DecodedWindow, decode_clip
from pipeline.decode.frames import decoder_name
from pipeline.decode.wire import Channel, Job
from pipeline.errors import ClipError, RejectionClass
from pipeline.policies import BackendName

_PR_SET_PDEATHSIG = 1


def main() -> None:
    fd, parent = (int(argument) for argument in sys.argv[1:])
    _die_with(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    channel = Channel(socket.socket(fileno=fd))
    try:
        channel.send({"type": "ready", "decoders": {name: decoder_name(name) for name in get_args(BackendName)}})
        while True:
            message, clip = channel.receive()
            if message["type"] == "job":
                assert clip is not None, "a job comes with its clip"
                with clip:
                    _Attempts(channel, Job.from_message(message), clip).run()
    except (EOFError, ConnectionError):
        return  # the parent is gone, or is done with us


def _die_with(parent: int) -> None:
    """Be killed when the parent's spawning thread ends (on Linux; elsewhere the end of the socket has to do)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(0)


class _Attempts:
    """One job: backend after backend until one reads the clip."""

    def __init__(self, channel: Channel, job: Job, clip: Blob) -> None:
        self._channel = channel
        self._job = job
        self._clip = clip
        self._unacknowledged = 0

    def run(self) -> None:
        errors: list[ClipError] = []
        for backend in self._job.backends:
            try:
                summary = self._send_windows(backend)
            except ClipError as error:
                errors.append(error)
                if not may_fall_back(error):
                    break
                self._send("retract")
            else:
                self._send("done", summary=asdict(summary))
                return
        first, others = errors[0], errors[1:]
        message = "; then ".join([first.message, *(str(other) for other in others)])
        self._send("rejected", error_class=first.error_class.value, stage=first.stage, message=message)

    def _send_windows(self, backend: BackendName) -> ClipSummary:
        """ClipError only for what is wrong with the clip; a lost channel is not."""
        windows = self._guarded_windows(backend)
        while True:
            try:
                window = next(windows)
            except StopIteration as end:
                return end.value
            with window.pixels:
                self._wait_for_credit()
                self._unacknowledged += 1
                self._send("window", window.pixels, window=window.to_message())

    def _guarded_windows(self, backend: BackendName) -> Generator[DecodedWindow, None, ClipSummary]:
        job = self._job
        try:
            return (
                yield from decode_clip(
                    self._clip.path,
                    backend,
                    job.windows,
                    job.resize,
                    lengths=job.lengths,
                    threads=job.threads,
                )
            )
        except ClipError:
            raise
        except MemoryError as error:
            raise ClipError(RejectionClass.OUT_OF_MEMORY, "decode", f"{backend} could not allocate memory") from error
        # The per-clip boundary: decoders raise whatever their authors liked, and a clip is never worth a run.
        except Exception as error:
            message = f"{backend}: {type(error).__name__}: {error}".replace(self._clip.path, "the clip")
            raise ClipError(RejectionClass.DECODE_FAILED, "decode", message) from error

    def _wait_for_credit(self) -> None:
        while self._unacknowledged >= self._job.windows_in_flight:
            message, _ = self._channel.receive()
            if message["type"] == "ack" and message["job"] == self._job.number:
                self._unacknowledged -= 1

    def _send(self, kind: str, blob: Blob | None = None, **fields: object) -> None:
        self._channel.send({"type": kind, "job": self._job.number, **fields}, blob)


def may_fall_back(error: ClipError) -> bool:
    """Whether the next backend may try. Not where PyAV has found the clip damaged, empty, too short or unknown:
    another decoder could only hide that. (decord's failures are all DECODE_FAILED.)"""
    return error.error_class is RejectionClass.DECODE_FAILED


if __name__ == "__main__":
    main()
