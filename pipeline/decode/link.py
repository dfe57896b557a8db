"""The way between a pool and a decode child on another node: JSON and the bytes of at most one Blob, over TCP.

Not through Ray's object store: frames would lie in it on both nodes, in memory that is not bounded by what the
encoder takes, and be copied twice more. Over a socket the acks that hold back a child of this machine hold back one
elsewhere, whoever is killed leaves nothing behind, and both ends see it at once. Ray starts the other end
(`pipeline/remote_decode.py`) and carries the invitation.

Whoever comes in proves that it knows the invitation's secret, which does not cross the wire. What follows is not
encrypted, as Ray's own traffic is not, unless the cluster's network does it.
"""

from __future__ import annotations

import hmac
import importlib.metadata
import json
import platform
import secrets
import select
import socket
import struct
from dataclasses import dataclass, field
from typing import Any

from pipeline.decode.blob import Blob
from pipeline.decode.wire import Message

SILENT_SECONDS = 30.0
"""Without a byte from an end that owes one, its node is taken for lost."""
HANDSHAKE_SECONDS = 5.0

_HEAD = struct.Struct(">IQ")
_NONCE_BYTES = 32
_PROOF_BYTES = 32
_PART = 1 << 20
_MAX_JSON = 64 << 20


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where a pool's door is, and the secret that opens it."""

    host: str
    port: int
    secret: bytes = field(repr=False)


class Link:
    """One end. Not thread-safe, but for `is_open` and `close`."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(SILENT_SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: what is sent to a node that is gone fails
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(SILENT_SECONDS * 1000))
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, blob: Blob | None = None) -> None:
        """OSError if the peer is gone, or takes nothing for SILENT_SECONDS. The blob stays the caller's."""
        body = json.dumps(message, separators=(",", ":")).encode()
        size = 0 if blob is None else 1 + blob.size  # one more, so that an empty blob is one
        self._socket.sendall(_HEAD.pack(len(body), size) + body)
        if blob is None or not blob.size:
            return
        with blob.map() as mapped, memoryview(mapped) as view:
            for start in range(0, blob.size, _PART):
                with view[start : start + _PART] as part:
                    self._socket.sendall(part)

    def receive(self) -> tuple[Message, Blob | None]:
        """The next message; blocks for SILENT_SECONDS at most. EOFError, OSError or ValueError if the peer is gone or
        is none of ours."""
        head = bytearray(_HEAD.size)
        self._fill(memoryview(head))
        length, size = _HEAD.unpack(head)
        if length > _MAX_JSON:
            raise ValueError(f"a message of {length} bytes")
        body = bytearray(length)
        self._fill(memoryview(body))
        blob = self._receive_blob(size - 1) if size else None
        message = json.loads(body)
        if not isinstance(message, dict):
            raise ValueError(f"expected an object, got {type(message).__name__}")
        return message, blob

    def _receive_blob(self, size: int) -> Blob:
        blob = Blob.create()
        if size:
            blob.resize(size)
            with blob.map(writable=True) as mapped, memoryview(mapped) as view:
                self._fill(view)
        return blob

    def _fill(self, view: memoryview) -> None:
        done = 0
        while done < len(view):
            with view[done:] as rest:
                received = self._socket.recv_into(rest)
            if not received:
                raise EOFError("the peer closed the link")
            done += received

    def is_open(self) -> bool:
        """False once the peer has closed its end and everything it said was read."""
        try:
            poll = select.poll()
            poll.register(self._socket, select.POLLIN)
            return not poll.poll(0) or self._socket.recv(1, socket.MSG_PEEK) != b""
        except (OSError, ValueError):  # ValueError: closed at this end
            return False

    def close(self) -> None:
        self._socket.close()


def challenge(connection: socket.socket, secret: bytes) -> bool:
    """Whether the peer knows the secret. OSError or EOFError if it does not answer."""
    nonce = secrets.token_bytes(_NONCE_BYTES)
    connection.sendall(nonce)
    return hmac.compare_digest(_exactly(connection, _PROOF_BYTES), _proof(secret, nonce))


def answer(connection: socket.socket, secret: bytes) -> None:
    """Prove to the peer that we know the secret. OSError or EOFError if it does not ask."""
    connection.sendall(_proof(secret, _exactly(connection, _NONCE_BYTES)))


def what_decides_bytes(decoders: dict[str, str | None]) -> dict[str, Any]:
    """What must be the same on two nodes for a clip to give the same windows."""
    return {"decoders": decoders, "pillow": importlib.metadata.version("pillow"), "machine": platform.machine()}


def _proof(secret: bytes, nonce: bytes) -> bytes:
    return hmac.digest(secret, nonce, "sha256")


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise EOFError("the peer closed the connection")
        data += part
    return bytes(data)
