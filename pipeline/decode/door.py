"""Where decode children of other nodes come in, and what such a child is to its worker.

A `Door` listens on the encoder's node; `relay.serve` on another node brings a child to it. A worker of the pool takes
the child, hands it clips and holds it to its limits as one of its own: the relay reports what the child has used.
"""

from __future__ import annotations

import logging
import secrets
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import suppress

from pipeline.decode.blob import Blob
from pipeline.decode.link import HANDSHAKE_SECONDS, SILENT_SECONDS, Invitation, Link, challenge, what_decides_bytes
from pipeline.decode.supervisor import POLL_SECONDS, ChildDied
from pipeline.decode.wire import Message

logger = logging.getLogger(__name__)

_SECRET_BYTES = 32
_BACKLOG = 128


class RemoteChild:
    """A `Child` at the other end of a link. Ending it closes the link: its relay kills the process."""

    pid = None

    def __init__(self, link: Link, decoders: dict[str, str | None], where: str) -> None:
        self.decoders = decoders
        self._link = link
        self._where = where
        self._closed = False
        self._used = (0.0, 0)
        self._heard = time.monotonic()

    @property
    def is_alive(self) -> bool:
        """As far as this end knows: a node that was cut off is found out with the next clip."""
        return not self._closed and self._link.is_open()

    def register(self, selector: selectors.BaseSelector) -> None:
        selector.register(self._link, selectors.EVENT_READ, "message")

    def send(self, message: Message, blob: Blob | None = None) -> None:
        try:
            self._link.send(message, blob)
        except OSError as error:
            raise ChildDied(f"the link to {self._where} is lost: {error}") from error
        if message["type"] == "job":  # from here on its relay owes us signs of life
            self._heard = time.monotonic()

    def receive(self) -> tuple[Message, Blob | None] | None:
        try:
            report, blob = self._link.receive()
            used = report["used"]
            self._used = (float(used[0]), int(used[1]))
        except (EOFError, OSError, ValueError, LookupError, TypeError) as error:
            raise ChildDied(f"the link to {self._where} is lost: {error}") from error
        self._heard = time.monotonic()
        match report.get("message"):
            case None:
                return None
            case {"type": "died", "words": words}:
                raise ChildDied(f"on {self._where}: {words}")
            case dict(message):
                return message, blob
        raise ChildDied(f"{self._where} sent what no relay sends")

    def drain_stderr(self) -> bool:
        return False  # the relay keeps its words

    def cpu_seconds(self) -> float:
        """As last reported. ChildDied if the reports have stopped."""
        silent = time.monotonic() - self._heard
        if silent > SILENT_SECONDS:
            raise ChildDied(f"{self._where} has been silent for {silent:.0f} s")
        return self._used[0]

    def private_bytes(self) -> int:
        return self._used[1]

    def kill(self) -> None:
        self._closed = True
        self._link.close()


class Door:
    """A listening socket, and the children that came in and are not taken yet."""

    def __init__(self, host: str, decoders: dict[str, str | None]) -> None:
        """Lets in who has the invitation and, so that a window's bytes do not depend on the node, the same versions.
        OSError if `host` is no address of this machine."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self._listener.settimeout(POLL_SECONDS)
        self.invitation = Invitation(host, self._listener.getsockname()[1], secrets.token_bytes(_SECRET_BYTES))
        self._ours = what_decides_bytes(decoders)
        self._arrived: deque[RemoteChild] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="decode-door", daemon=True)
        self._thread.start()

    def next_child(self) -> RemoteChild | None:
        """The one that came first; blocks. None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._closed)
            return None if self._closed else self._arrived.popleft()

    def close(self) -> None:
        """Nobody comes in any more; who waits inside is sent away."""
        with self._changed:
            self._closed = True
            waiting, self._arrived = self._arrived, deque()
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._thread.join()
        self._listener.close()
        for child in waiting:
            child.kill()

    def _listen(self) -> None:
        while not self._closed:
            try:
                connection, (host, *_) = self._listener.accept()
            except OSError:  # a timeout; or closed, which the loop sees
                continue
            try:
                self._admit(connection, host)
            except (OSError, EOFError, ValueError, LookupError) as error:
                connection.close()
                logger.warning("a remote decode child did not come in: from=%s why=%s", host, error)

    def _admit(self, connection: socket.socket, host: str) -> None:
        connection.settimeout(HANDSHAKE_SECONDS)
        if not challenge(connection, self.invitation.secret):
            raise ValueError("it does not know the invitation's secret")
        link = Link(connection)
        theirs, _ = link.receive()
        if theirs != self._ours:
            link.send({"refused": f"its versions are {theirs}, the encoder's {self._ours}"})
            raise ValueError(f"its versions are {theirs}, ours {self._ours}")
        link.send({})
        with self._changed:
            if self._closed:
                link.close()
                return
            self._arrived.append(RemoteChild(link, theirs["decoders"], host))
            self._changed.notify()
