"""A real S3 server for tests (SeaweedFS, from PyPI) and a proxy that counts requests and breaks replies.

Everything listens on 127.0.0.1 only; the server takes no request without its credentials.
"""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import socketserver
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs

PORTS = (
    "s3",
    "master",
    "master.grpc",
    "volume",
    "volume.grpc",
    "filer",
    "filer.grpc",
    "s3.grpc",
    "admin",
    "admin.grpc",
)


@dataclass(frozen=True, slots=True)
class S3Server:
    """`url` is a bucket; credentials are in the environment, as the project wants them."""

    port: int
    secret: str
    url: str = "s3://bucket"

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": f"http://127.0.0.1:{self.port}"}


@contextmanager
def running_s3() -> Iterator[S3Server]:
    """Start a server with an empty bucket, set AWS_* in the environment, stop it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    secret = secrets.token_hex(16)
    user = {"name": "tests", "credentials": [{"accessKey": "tests", "secretKey": secret}], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
    options = [
        f"-{name.partition('.')[0]}.port{name[len(name.partition('.')[0]) :]}={port}" for name, port in ports.items()
    ]
    program = Path(sysconfig.get_path("scripts")) / "weed"
    command = [str(program), "mini", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *options]
    command += [f"-s3.config={folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    command += ["-admin.ui=false", "-webdav=false"]
    environment = {
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(folder / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(folder / "none"),
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            server = S3Server(ports["s3"], secret)
            _make_bucket(server, process, folder / "log")
            yield server
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _make_bucket(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", server.port), 1).close()
            fs, bucket = url_to_fs(server.url, **server.options)
            fs.mkdir(bucket)
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the S3 server did not start:\n{log.read_text()[-2000:]}") from error
            time.sleep(0.05)
        else:
            return


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the reply to one object GET."""

    cut_after: int | None = None
    """Body bytes that get through before the connection is closed."""
    header: bytes = b""
    """A header line put into the reply."""


@dataclass
class Proxy:
    """Passes connections on to the server; notes the head of each request."""

    port: int
    upstream: int
    faults: deque[Fault] = field(default_factory=deque)
    heads: list[str] = field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": f"http://127.0.0.1:{self.port}"}

    def requests(self, method: str, name: str) -> list[str]:
        """Heads of the requests for an object, by the end of its path."""
        return [head for head in self.heads if head.startswith(f"{method} ") and head.split()[1].endswith(name)]

    def relay(self, client: socket.socket) -> None:
        head, rest = _read_head(client)
        if not head:
            return
        self.heads.append(head.decode("latin-1"))
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            # one request per connection, so that the reply's end is the connection's
            server.sendall(head[:-2] + b"Connection: close\r\n\r\n" + rest)
            left = _content_length(head) - len(rest)
            while left > 0 and (data := client.recv(min(65536, left))):
                server.sendall(data)
                left -= len(data)
            reply, body = _read_head(server)
            is_object = head.startswith(b"GET ") and b"list-type" not in head.split(b"\r\n")[0]
            fault = self.faults.popleft() if is_object and self.faults else Fault()
            client.sendall(reply[:-2] + fault.header + b"\r\n")
            allowed = 1 << 62 if fault.cut_after is None else fault.cut_after
            while body and allowed:
                client.sendall(body[:allowed])
                allowed -= min(allowed, len(body))
                body = server.recv(65536)


@contextmanager
def proxy_to(server: S3Server) -> Iterator[Proxy]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up on a reply, as it may
                proxy.relay(self.request)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        proxy = Proxy(listener.server_address[1], server.port)
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            thread.join()


def _read_head(connection: socket.socket) -> tuple[bytes, bytes]:
    """Up to and with the blank line, and what came after it already."""
    data = b""
    while b"\r\n\r\n" not in data:
        chunk = connection.recv(65536)
        if not chunk:
            return b"", b""
        data += chunk
    head, _, rest = data.partition(b"\r\n\r\n")
    return head + b"\r\n\r\n", rest


def _content_length(head: bytes) -> int:
    lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    return next((int(value) for name, _, value in lines if name == b"content-length"), 0)
