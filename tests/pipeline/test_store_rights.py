"""What a run asks of an object store: where its credentials may stand, which rights it needs, how many requests it
makes. The tables and the policy are in docs/storage.md; the server is real and enforces them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from s3fs import S3FileSystem

from pipeline.errors import StorageError
from pipeline.storage import Store
from tests.s3_server import Fault, S3Server, proxy_to, running_s3
from tests.whole_run import Run, one_encoder, settings_for, upload

DOCUMENT = (Path(__file__).parents[2] / "docs/storage.md").read_text(encoding="utf-8")
RIGHTS = ("List:src", "Read:src", "List:out", "Read:out", "Write:out")
USERS = {"admin": ("Admin",), "job": RIGHTS} | {
    f"no-{right}": tuple(other for other in RIGHTS if other != right) for right in RIGHTS
}
SHARDS = 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    with one_encoder(tmp_path_factory.mktemp("scratch")) as run:
        yield run


@pytest.fixture(scope="module")
def server(v2d_shards: Callable[..., list[Path]], tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """With shards in s3://src/clips."""
    folder = tmp_path_factory.mktemp("source")
    v2d_shards(folder, num_shards=SHARDS, good=1, failed=0, broken=0)
    with running_s3(USERS, buckets=("src", "out")) as server:
        upload(folder, Store("s3://src", options=server.options), "clips")
        yield server


@pytest.fixture
def become(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """become(user) or become(environment): new clients take their credentials there."""

    def become(who: str | dict[str, str]) -> None:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (server.environment(who) if isinstance(who, str) else who).items():
            monkeypatch.setenv(name, value)
        S3FileSystem.clear_instance_cache()

    yield become
    S3FileSystem.clear_instance_cache()


def test_credentials_and_endpoint_from_the_environment(server: S3Server, become: Callable[..., None]) -> None:
    become(server.environment("job") | {"AWS_ENDPOINT_URL": str(server.options["endpoint_url"])})
    store = Store("s3://out/environment")
    assert store.create("a", b"1")
    assert store.read_bytes("a") == b"1"


def test_credentials_and_endpoint_from_a_profile(
    server: S3Server, become: Callable[..., None], tmp_path: Path
) -> None:
    key = f"aws_access_key_id = job\naws_secret_access_key = {server.secrets['job']}\n"
    (tmp_path / "credentials").write_text(f"[encode]\n{key}")
    (tmp_path / "config").write_text(
        f"[profile encode]\nregion = us-east-1\nendpoint_url = {server.options['endpoint_url']}\n"
    )
    become(
        {
            "AWS_PROFILE": "encode",
            "AWS_CONFIG_FILE": str(tmp_path / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        }
    )
    store = Store("s3://out/profile")
    assert store.create("a", b"1")
    assert list(store.names("", "")) == ["a"]


@pytest.mark.parametrize(
    ("endpoint", "message"),
    [
        ("127.0.0.1:8333", "endpoint_url: expected http://HOST:PORT or https://HOST"),
        ("http://user:hush@127.0.0.1:8333", "endpoint_url: it holds a user or a password"),
    ],
)
@pytest.mark.parametrize("where", ["options", "environment"])
def test_an_endpoint_that_cannot_be_used(
    endpoint: str, message: str, where: str, become: Callable[..., None], server: S3Server
) -> None:
    options = {"endpoint_url": endpoint} if where == "options" else {}
    become(server.environment("job") | ({"AWS_ENDPOINT_URL": endpoint} if where == "environment" else {}))
    with pytest.raises(
        StorageError, match=message if where == "options" else message.replace("endpoint_url", "AWS_ENDPOINT_URL")
    ) as caught:
        Store("s3://out/x", options=options)
    assert "hush" not in str(caught.value)


def test_a_bucket_that_is_not_there(server: S3Server, become: Callable[..., None], run: Run) -> None:
    become("job")
    with pytest.raises(StorageError, match=r"s3://missing/.*"):
        run(settings_for("s3://src/clips", "s3://missing/out", server.options))


def test_the_documented_rights_suffice(server: S3Server, become: Callable[..., None], run: Run) -> None:
    become("job")
    settings = settings_for("s3://src/clips", "s3://out/job", server.options)
    assert run(settings).counts.clips_encoded == SHARDS
    assert run(settings).counts.clips_encoded == SHARDS, "nothing is left to do, and that can be seen"


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("List:src", r"cannot read s3://src/clips: PermissionError: .*s3:ListBucket"),
        ("Read:src", r"cannot read s3://src/clips/00000\.tar: PermissionError: .*s3:GetObject"),
        ("List:out", r"cannot read s3://out/\S*/receipts: PermissionError: .*s3:ListBucket"),
        ("Read:out", r"cannot read s3://out/\S*: PermissionError: .*s3:GetObject"),
        ("Write:out", r"cannot write s3://out/\S*/run\.json: PermissionError: .*s3:PutObject"),
    ],
)
def test_a_missing_right_is_named(
    missing: str, message: str, server: S3Server, become: Callable[..., None], run: Run
) -> None:
    become(f"no-{missing}")
    output = f"s3://out/{missing.replace(':', '-')}"
    with pytest.raises(StorageError, match=message):
        run(settings_for("s3://src/clips", output, server.options))
    become("admin")
    left = Store(output, options=server.options)
    assert list(left.names("receipts", "")) == []
    if missing in ("List:src", "Write:out"):
        assert left.info("run.json") is None, "it stopped before it claimed the folder"


def test_the_policy_asks_for_these_rights_and_no_others() -> None:
    match = re.search(r"```json\n(.*?)```", DOCUMENT, re.DOTALL)
    assert match is not None
    statements = json.loads(match[1])["Statement"]
    actions = {action for statement in statements for action in statement["Action"]}
    assert actions == {"s3:ListBucket", "s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"}
    assert all(statement["Effect"] == "Allow" for statement in statements)


def documented_requests() -> dict[str, int]:
    rows = re.findall(r"^\| (HEAD|GET|PUT|LIST) \| `([^`]+)` \|[^|]*\| (\d+) \|", DOCUMENT, re.MULTILINE)
    return {f"{method} {name}": int(number) for method, name, number in rows}


def what(method: str, target: str) -> str:
    """PUT /out/run/shards/00001.tar -> PUT OUT/shards/ID.tar"""
    url = urlsplit(target)
    query = parse_qs(url.query)
    if "list-type" in query:
        method, path = "LIST", f"{url.path}/{query.get('prefix', [''])[0]}"
    else:
        path = url.path
    path = path.removeprefix("/src/clips").removeprefix("/out/counted")
    side = "SOURCE" if url.path.startswith("/src") else "OUT"
    return f"{method} {side}{re.sub(r'[0-9]{5}', 'ID', path)}"


def test_the_requests_of_a_run_are_those_documented(server: S3Server, become: Callable[..., None], run: Run) -> None:
    become("job")
    seen: list[str] = []

    def note(method: str, target: str) -> Fault:
        seen.append(what(method, target))
        return Fault()

    with proxy_to(server, note) as proxy:
        run(settings_for("s3://src/clips", "s3://out/counted", proxy.options))
    documented = documented_requests()
    counts: Counter[str] = Counter(seen)
    expected = {name: number * (SHARDS if "ID" in name else 1) for name, number in documented.items()}
    assert dict(counts) == expected
