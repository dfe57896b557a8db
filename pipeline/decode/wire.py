"""Messages between a decode child and its parent: JSON with a length before it, and at most one file descriptor.

Stream sockets between two processes of one machine (socketpair), so a message is either read whole or the peer is
gone.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from dataclasses import dataclass
from typing import Any

from pipeline.decode.blob import Blob
from pipeline.policies import BackendName, ResizePolicy, WindowPolicy

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")
_FD = struct.Struct("i")
_CLOSE_ON_EXEC = getattr(socket, "MSG_CMSG_CLOEXEC", 0)  # Linux


@dataclass(frozen=True, slots=True)
class Job:
    """One clip to decode. `number` marks its acks: those of a clip before may still be on their way."""

    number: int
    backends: tuple[BackendName, ...]
    windows: WindowPolicy
    resize: ResizePolicy
    lengths: tuple[int, ...]
    threads: int
    windows_in_flight: int

    def to_message(self) -> Message:
        fields = {name: getattr(self, name) for name in self.__slots__}
        return fields | {
            "type": "job",
            "windows": self.windows.model_dump(mode="json"),
            "resize": self.resize.model_dump(mode="json"),
        }

    def ack(self) -> Message:
        """One of its windows was taken."""
        return {"type": "ack", "job": self.number}

    @classmethod
    def from_message(cls, message: Message) -> Job:
        fields = {name: message[name] for name in cls.__slots__}
        fields["windows"] = WindowPolicy.model_validate(message["windows"])
        fields["resize"] = ResizePolicy.model_validate(message["resize"])
        fields["lengths"] = tuple(message["lengths"])
        return cls(**fields)


class Channel:
    """One end. Not thread-safe: one thread per end."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message, blob: Blob | None = None) -> None:
        """OSError (BrokenPipeError, ConnectionResetError) if the peer is gone. The blob stays the caller's."""
        body = json.dumps(message, separators=(",", ":")).encode()
        data = _LENGTH.pack(len(body)) + body
        sent = 0
        if blob is not None:
            sent = socket.send_fds(self._socket, [data], [blob.fd])
        self._socket.sendall(data[sent:])

    def receive(self) -> tuple[Message, Blob | None]:
        """The next message; blocks. EOFError or OSError if the peer is gone."""
        # A descriptor arrives with the first byte of its message. (socket.recv_fds drops its flags.)
        head, ancillary, _, _ = self._socket.recvmsg(_LENGTH.size, socket.CMSG_LEN(_FD.size), _CLOSE_ON_EXEC)
        fds = [_FD.unpack(data[: _FD.size])[0] for _, kind, data in ancillary if kind == socket.SCM_RIGHTS]
        blob = Blob(fds[0], os.fstat(fds[0]).st_size) if fds else None
        if not head:
            raise EOFError("the peer closed the channel")
        head += self._exactly(_LENGTH.size - len(head))
        return json.loads(self._exactly(_LENGTH.unpack(head)[0])), blob

    def _exactly(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(size - len(data))
            if not part:
                raise EOFError("the peer closed the channel in the middle of a message")
            data += part
        return bytes(data)

    def close(self) -> None:
        self._socket.close()
