"""A real S3 server for tests (SeaweedFS, from PyPI) and a proxy that counts requests and breaks them.

Everything listens on 127.0.0.1 only; the server takes no request without its credentials.
"""

from __future__ import annotations

import json
import random
import re
import secrets
import shutil
import socket
import socketserver
import subprocess
import sysconfig
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError
from botocore.session import get_session

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
START_SECONDS = 60.0


class S3Server:
    """The server process and its folder. `url` is a bucket; credentials are in the environment, as the project
    wants them."""

    def __init__(self, folder: Path, users: Mapping[str, Sequence[str]], buckets: Sequence[str]) -> None:
        """`users`: name (which is the access key) to SeaweedFS actions. The first one administers."""
        self.folder = folder
        self.secrets = {name: secrets.token_hex(16) for name in users}
        self.buckets = tuple(buckets)
        self._ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
        self._process: subprocess.Popen[bytes] | None = None
        identities = [
            {
                "name": name,
                "credentials": [{"accessKey": name, "secretKey": self.secrets[name]}],
                "actions": [*actions],
            }
            for name, actions in users.items()
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))

    @property
    def port(self) -> int:
        return self._ports["s3"]

    @property
    def url(self) -> str:
        return f"s3://{self.buckets[0]}"

    @property
    def options(self) -> dict[str, Any]:
        return {"endpoint_url": f"http://127.0.0.1:{self.port}"}

    def environment(self, user: str | None = None) -> dict[str, str]:
        """AWS_* for one of the users, by default the first, without any other source of credentials."""
        user = user or next(iter(self.secrets))
        return {
            "AWS_ACCESS_KEY_ID": user,
            "AWS_SECRET_ACCESS_KEY": self.secrets[user],
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(self.folder / "none"),
            "AWS_SHARED_CREDENTIALS_FILE": str(self.folder / "none"),
        }

    def client(self) -> Any:
        """A plain botocore client of the first user: the tests' own look at the store."""
        name, secret = next(iter(self.secrets.items()))
        return get_session().create_client(
            "s3",
            region_name="us-east-1",
            endpoint_url=self.options["endpoint_url"],
            aws_access_key_id=name,
            aws_secret_access_key=secret,
            config=Config(connect_timeout=5, read_timeout=30, retries={"mode": "standard", "total_max_attempts": 2}),
        )

    def start(self) -> None:
        """Start it, again with the same ports and the same objects if it was killed; back when it answers."""
        ports = [f"-{_flag(name)}={port}" for name, port in self._ports.items()]
        program = Path(sysconfig.get_path("scripts")) / "weed"
        command = [str(program), "mini", f"-dir={self.folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *ports]
        command += [f"-s3.config={self.folder / 's3.json'}", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        command += ["-admin.ui=false", "-webdav=false"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder)
        self._wait_until_it_stores()

    def kill(self) -> None:
        """SIGKILL, as a machine that is gone."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _log(self) -> Path:
        return self.folder / "log"

    def _wait_until_it_stores(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self._make_buckets()
            except (OSError, BotoCoreError) as error:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the S3 server did not start:\n{self._log.read_text()[-2000:]}") from error
                time.sleep(0.05)
            else:
                return

    def _make_buckets(self) -> None:
        """Buckets, and an object written and removed: volumes are found after buckets can be made."""
        socket.create_connection(("127.0.0.1", self.port), 1).close()
        client = self.client()
        try:
            standing = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in self.buckets:
                if bucket not in standing:
                    client.create_bucket(Bucket=bucket)
            client.put_object(Bucket=self.buckets[0], Key=".ready", Body=b"ready")
            client.delete_object(Bucket=self.buckets[0], Key=".ready")
        except client.exceptions.ClientError as error:
            raise OSError(f"not ready: {error}") from error


@contextmanager
def running_s3(
    users: Mapping[str, Sequence[str]] | None = None, buckets: Sequence[str] = ("bucket",)
) -> Iterator[S3Server]:
    """Start a server with empty buckets, set AWS_* in the environment for its first user, stop it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="s3-"))
    server = S3Server(folder, users or {"tests": ["Admin"]}, buckets)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in server.environment().items():
                patch.setenv(name, value)
            server.start()
            yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _flag(name: str) -> str:
    """s3 -> s3.port, s3.grpc -> s3.port.grpc."""
    role, dot, kind = name.partition(".")
    return f"{role}.port{dot}{kind}"


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
    """What happens to one request. The default is nothing."""

    cut_after: int | None = None
    """Body bytes of the reply that get through before the connection is closed."""
    header: bytes = b""
    """A header line put into the reply."""
    instead: bytes | None = None
    """The reply of a server that never saw the request; empty: the connection is closed without one."""
    stall_seconds: float = 0.0
    """Nothing is said for so long, then the connection is closed; the server never saw the request."""
    lost: bool = False
    """The server does it, and the connection is closed without its reply."""
    unread: bool = False
    """The request's body is not taken from the client."""
    continues: bool = True
    """A client that asks first (Expect: 100-continue) is told to send its body."""


def _refusal(status: str, code: str) -> bytes:
    body = f"<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>{code}</Message></Error>"
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n\r\n{body}"
    ).encode()


INTERNAL_ERROR = Fault(instead=_refusal("500 Internal Server Error", "InternalError"))
SLOW_DOWN = Fault(instead=_refusal("503 Slow Down", "SlowDown"))
CUT_BEFORE_REPLY = Fault(instead=b"")
CUT_UPLOAD = Fault(instead=b"", unread=True)
LOST_REPLY = Fault(lost=True)


Plan = Callable[[str, str], Fault]
"""(method, path with query) -> what happens to this request."""


@dataclass
class FaultPlan:
    """Faults drawn from a seed: which ones a request meets depends on its method, its path and how often it was
    made, not on the order in which threads come."""

    seed: int
    rate: float = 0.3
    """Share of requests that meet a fault. Never more than two in a row for one method and path."""
    stall_seconds: float = 3.0
    drawn: list[str] = field(default_factory=list)
    """Method, path and name of each fault, as they happened."""
    _seen: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, method: str, target: str) -> Fault:
        where = f"{method} {_stable(target)}"
        with self._lock:
            turn = self._seen[where]
            self._seen[where] += 1
            draw = random.Random(f"{self.seed} {where} {turn}")
            if turn % 3 == 2 or draw.random() >= self.rate:
                return Fault()
            name = draw.choice(self._choices(method))
            self.drawn.append(f"{where} {name}")
        return self._fault(name, draw)

    def _choices(self, method: str) -> list[str]:
        names = ["500", "503", "stall", "cut before the reply"]
        if method == "GET":
            names += ["cut in the body"] * 2
        if method in ("PUT", "POST", "DELETE"):
            names += ["lost reply"] * 2
        if method == "PUT":
            names += ["cut upload"]
        return names

    def _fault(self, name: str, draw: random.Random) -> Fault:
        if name == "stall":
            return Fault(stall_seconds=self.stall_seconds)
        if name == "cut in the body":
            return Fault(cut_after=draw.choice([0, 1, 511, 512, 100_000, draw.randrange(1_000_000)]))
        return {
            "500": INTERNAL_ERROR,
            "503": SLOW_DOWN,
            "cut before the reply": CUT_BEFORE_REPLY,
            "lost reply": LOST_REPLY,
            "cut upload": CUT_UPLOAD,
        }[name]


@dataclass
class Proxy:
    """Passes connections on to the server, one request each; notes the head of each request."""

    port: int
    upstream: int
    faults: deque[Fault] = field(default_factory=deque)
    """Met by the next GETs of objects, one each."""
    plan: Plan | None = None
    heads: list[str] = field(default_factory=list, repr=False)

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
        fault = self._fault(head)
        left = _content_length(head) - len(rest)
        if _EXPECT.search(head) and fault.continues:
            client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            head = _EXPECT.sub(b"", head)
        if fault.instead is not None or fault.stall_seconds:
            if not fault.unread:
                _pass_on(client, None, left)
            time.sleep(fault.stall_seconds)
            reply = fault.instead or b""
            client.sendall(reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n" if reply and _is_head(head) else reply)
            return
        with socket.create_connection(("127.0.0.1", self.upstream)) as server:
            # one request per connection, so that the reply's end is the connection's
            server.sendall(head[:-2] + b"Connection: close\r\n\r\n" + rest)
            _pass_on(client, server, left)
            reply, body = _read_head(server)
            if fault.lost or not reply:
                return
            client.sendall(reply[:-2] + fault.header + b"\r\n")
            allowed = 1 << 62 if fault.cut_after is None else fault.cut_after
            while body and allowed:
                client.sendall(body[:allowed])
                allowed -= min(allowed, len(body))
                body = server.recv(65536)

    def _fault(self, head: bytes) -> Fault:
        method, target = head.decode("latin-1").split(" ", 2)[:2]
        if method == "GET" and "list-type" not in target and self.faults:
            return self.faults.popleft()
        return self.plan(method, target) if self.plan else Fault()


@contextmanager
def proxy_to(server: S3Server, plan: Plan | None = None) -> Iterator[Proxy]:
    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):  # the client gave up on a reply, as it may, or the server is gone
                proxy.relay(self.request)

    class Listener(socketserver.ThreadingTCPServer):
        request_queue_size = 128

    with Listener(("127.0.0.1", 0), Handler) as listener:
        listener.daemon_threads = True
        listener.block_on_close = False
        proxy = Proxy(listener.server_address[1], server.port, plan=plan)
        thread = threading.Thread(target=listener.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield proxy
        finally:
            listener.shutdown()
            thread.join()


_EXPECT = re.compile(rb"expect: *100-continue\r\n", re.IGNORECASE)


def _is_head(head: bytes) -> bool:
    return head.startswith(b"HEAD ")


def _stable(target: str) -> str:
    """A path and query without what differs from run to run: the number of an upload."""
    return re.sub(r"(?<=uploadId=)[^&]*", "", unquote(target))


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


def _pass_on(client: socket.socket, server: socket.socket | None, left: int) -> None:
    """The rest of a request's body, to the server or to nobody."""
    while left > 0 and (data := client.recv(min(65536, left))):
        if server is not None:
            server.sendall(data)
        left -= len(data)


def _content_length(head: bytes) -> int:
    lines = (line.partition(b":") for line in head.lower().split(b"\r\n"))
    return next((int(value) for name, _, value in lines if name == b"content-length"), 0)
