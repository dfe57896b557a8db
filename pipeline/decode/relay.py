"""The other node's end of a remote decode child: brings a child to an encoder's door and stands between the two.

`serve` runs where the cores are, in the thread that lives as long as its children (the kernel kills a child with the
thread that started it). The child is the one that an encoder would start on its own node; the relay passes its
messages on, with what it has used up to then, and kills it when the encoder closes the link.
"""

from __future__ import annotations

import selectors
import socket
import time
from contextlib import closing, suppress
from typing import Any

import psutil

from pipeline.decode.blob import Blob
from pipeline.decode.link import Invitation, Link, answer, what_decides_bytes
from pipeline.decode.supervisor import POLL_SECONDS, ChildDied, DecodeChild
from pipeline.decode.wire import Message
from pipeline.errors import PipelineError

_CONNECT_SECONDS = 10.0
_JOB_ENDS = ("done", "rejected")


def serve(invitation: Invitation) -> None:
    """Decode for a pool, one child after the other, until its door is closed.

    PipelineError if the first child does not start, or is not let in: the encoder is not reached from here, or has
    other versions of what decides a window's bytes.
    """
    served = False
    while True:
        child = DecodeChild()
        try:
            link = _come_in(invitation, child)
        except (OSError, EOFError, ValueError) as error:
            child.kill()
            if served:  # the door is closed
                return
            where = f"{invitation.host}:{invitation.port}"
            raise PipelineError(f"a remote decode child is not let in by the encoder at {where}: {error}") from error
        try:
            with closing(link):
                _Relay(child, link).run()
        finally:
            child.kill()
        served = True


def _come_in(invitation: Invitation, child: DecodeChild) -> Link:
    """ValueError if the door does not want us."""
    connection = socket.create_connection((invitation.host, invitation.port), timeout=_CONNECT_SECONDS)
    try:
        answer(connection, invitation.secret)
        link = Link(connection)
        link.send(what_decides_bytes(child.decoders))
        reply, _ = link.receive()
        if "refused" in reply:
            raise ValueError(reply["refused"])
        return link
    except BaseException:  # whatever it is passes on; the door must not wait for a child that never comes in
        connection.close()
        raise


class _Relay:
    """One child and one link, until either ends."""

    def __init__(self, child: DecodeChild, link: Link) -> None:
        self._child = child
        self._link = link
        self._in_job = False
        self._told = 0.0

    def run(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                self._child.register(selector)
                selector.register(self._link, selectors.EVENT_READ, "link")
                while True:
                    self._pass_on({key.data: key.fileobj for key, _ in selector.select(POLL_SECONDS)}, selector)
        except ChildDied as died:
            if self._in_job:
                with suppress(OSError):
                    self._link.send({"used": [0.0, 0], "message": {"type": "died", "words": str(died)}})
        except (OSError, EOFError, ValueError):
            return  # the encoder is done with this child, or is gone

    def _pass_on(self, ready: dict[str, Any], selector: selectors.BaseSelector) -> None:
        if "stderr" in ready and not self._child.drain_stderr():
            selector.unregister(ready["stderr"])
        if "link" in ready:
            message, clip = self._link.receive()
            self._in_job = self._in_job or message["type"] == "job"
            self._child.send(message, clip)
            if clip is not None:
                clip.close()
        if "message" in ready:
            message, pixels = self._child.receive()
            self._tell(message, pixels)
            if pixels is not None:
                pixels.close()
            if message["type"] in _JOB_ENDS:
                self._in_job = False
        elif self._in_job and time.monotonic() - self._told >= POLL_SECONDS:
            self._tell(None)

    def _tell(self, message: Message | None, blob: Blob | None = None) -> None:
        """Pass on a message, or give a sign of life, with the child's processor time and private memory."""
        try:
            used = [self._child.cpu_seconds(), self._child.private_bytes()]
        except psutil.NoSuchProcess:
            raise ChildDied("it has just ended") from None
        self._link.send({"used": used, "message": message}, blob)
        self._told = time.monotonic()
