"""Stores: create-if-absent has one winner, replace is atomic, reads resume or refuse. S3 is a real server."""

from __future__ import annotations

import hashlib
import io
import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.core import url_to_fs

from pipeline.errors import SourceChanged, StorageError
from pipeline.storage import ObjectInfo, Store, glob_objects, list_folder, object_info, open_stream
from pipeline.store_errors import redact
from tests.s3_server import Fault, Proxy, S3Server, proxy_to

RACERS = 8
BODY = b"".join(hashlib.sha256(number.to_bytes(4, "big")).digest() for number in range(65536))  # 2 MiB, no repeats


def race(make_store: Callable[[], Store], contents: list[bytes]) -> list[bool]:
    """Each content is created under one name by a thread of its own, all at once."""
    start = threading.Barrier(len(contents))

    def contend(content: bytes) -> bool:
        store = make_store()
        start.wait()
        return store.create("shards/00000.tar", content)

    with ThreadPoolExecutor(len(contents)) as pool:
        return list(pool.map(contend, contents))


def read_all(stream: io.RawIOBase) -> bytes:
    return b"".join(iter(lambda: stream.read(1 << 18) or b"", b""))


def files_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# On local disk


@pytest.mark.parametrize("as_file", [False, True])
def test_create_keeps_the_first(tmp_path: Path, as_file: bool) -> None:
    store = Store(str(tmp_path / "out"))
    contents: list[Any] = [b"first", b"second"]
    if as_file:
        for number, content in enumerate(list(contents)):
            contents[number] = tmp_path / f"{number}"
            contents[number].write_bytes(content)
    assert [store.create("a/b.json", content) for content in contents] == [True, False]
    assert store.read_bytes("a/b.json") == b"first"
    assert files_below(tmp_path / "out") == ["a/b.json"], "nothing is left in the staging folder"


def contend_in_process(url: str, content: bytes, start: Any, results: Any) -> None:
    store = Store(url)
    start.wait()
    results.put((store.create("x", content), content))


def test_create_race_between_processes_has_one_winner(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Barrier(RACERS), context.Queue()
    contents = [bytes([number]) * 1_000_000 for number in range(RACERS)]
    racers = [
        context.Process(target=contend_in_process, args=(str(tmp_path / "out"), content, start, results))
        for content in contents
    ]
    for racer in racers:
        racer.start()
    outcomes = [results.get(timeout=30) for _ in racers]
    for racer in racers:
        racer.join()
    winners = [content for created, content in outcomes if created]
    assert len(winners) == 1
    assert (tmp_path / "out" / "x").read_bytes() == winners[0]
    assert files_below(tmp_path / "out") == ["x"]


def test_create_race_between_threads_has_one_winner(tmp_path: Path) -> None:
    contents = [bytes([number]) * 300_000 for number in range(RACERS)]
    for round_number in range(10):
        folder = tmp_path / str(round_number)
        outcomes = race(lambda folder=folder: Store(str(folder)), contents)
        assert outcomes.count(True) == 1
        assert (folder / "shards/00000.tar").read_bytes() == contents[outcomes.index(True)]


def write_until_killed(url: str) -> None:
    store = Store(url)
    for number in range(1_000_000):
        store.create(f"shards/{number:06d}.tar", b"x" * 4_000_000)


def test_a_killed_writer_leaves_whole_objects_only(tmp_path: Path) -> None:
    """SIGKILL at moments a few milliseconds apart: names() gives whole objects, staging is nobody's, and goes."""
    store = Store(str(tmp_path / "out"))
    for delay in (0.02, 0.035, 0.05, 0.065):
        writer = multiprocessing.get_context("fork").Process(target=write_until_killed, args=(store.url,))
        writer.start()
        writer.join(delay)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        for name in store.names("shards", ".tar"):
            assert (tmp_path / "out/shards" / name).stat().st_size == 4_000_000
    assert list(store.names("", "")) == []
    assert all(name.startswith("shards/") for name in files_below(tmp_path / "out")), "no debris"


def test_replace_is_atomic(tmp_path: Path) -> None:
    """Readers see the old or the new content whole, whatever the moment."""
    store = Store(str(tmp_path))
    store.replace("manifest.json", b"0" * 500_000)
    stop = threading.Event()
    seen: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            seen.append(store.read_bytes("manifest.json"))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(30):
        store.replace("manifest.json", str(number % 10).encode() * 500_000)
    stop.set()
    reader.join()
    assert seen
    assert all(content in {bytes([48 + number]) * 500_000 for number in range(10)} for content in set(seen))
    assert files_below(tmp_path) == ["manifest.json"]


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"a file where the folder should be")
    store = Store(str(tmp_path / "out"))
    for write in (store.create, store.replace):
        with pytest.raises(StorageError, match=r"cannot write .*/out/receipts/0\.json"):
            write("receipts/0.json", b"{}")
    assert store.info("receipts/0.json") is None
    with pytest.raises(FileNotFoundError):
        store.read_bytes("receipts/0.json")


def test_names_are_sorted_and_direct(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    for name in ("r/2.json", "r/10.json", "r/1.json", "r/1.tar", "r/deep/3.json", "9.json"):
        store.create(name, b"")
    assert list(store.names("r", ".json")) == ["1.json", "10.json", "2.json"]
    assert list(store.names("absent", ".json")) == []


def test_info_and_readers(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    store.create("a/b", BODY)
    assert store.info("a/b") == ObjectInfo(f"{tmp_path}/a/b", len(BODY), None)
    assert store.info("a") is None, "a folder is no object"
    assert store.info("c") is None
    assert store.info("a/b/c") is None
    assert store.info("c" * 300) is None
    with store.open_stream("a/b") as stream:
        assert stream.read(10) == BODY[:10]
    with store.open_seekable("a/b") as file:
        file.seek(-5, os.SEEK_END)
        assert file.read() == BODY[-5:]
    assert store.local_file("a/b", tmp_path / "nowhere") == tmp_path / "a/b", "a local object is not copied"
    for absent in (store.open_stream, store.open_seekable, store.read_bytes):
        with pytest.raises(FileNotFoundError):
            absent("c")
    with pytest.raises(FileNotFoundError):
        store.local_file("a", tmp_path)


@pytest.mark.parametrize("url", ["{}", "file://{}", "local://{}"])
def test_every_spelling_of_a_local_folder_is_local(tmp_path: Path, url: str) -> None:
    store = Store(url.format(tmp_path) + "/")
    assert store.is_local
    store.require_conditional_writes()
    assert store.create("x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


def test_a_store_survives_pickling(tmp_path: Path) -> None:
    store = pickle.loads(pickle.dumps(Store(str(tmp_path), options={"auto_mkdir": True}, single_driver=True)))
    assert (store.url, store.options, store.single_driver) == (str(tmp_path), {"auto_mkdir": True}, True)
    assert store.create("x", b"1")


def test_a_store_without_conditional_writes_wants_a_promise() -> None:
    refused = Store("memory://refused")
    with pytest.raises(StorageError, match="single_driver: true"):
        refused.require_conditional_writes()
    with pytest.raises(StorageError, match="single_driver: true"):
        refused.create("x", b"1")
    promised = Store("memory://promised", single_driver=True)
    promised.require_conditional_writes()
    assert [promised.create("a/x", content) for content in (b"1", b"2")] == [True, False]
    assert promised.read_bytes("a/x") == b"1"
    promised.replace("a/x", b"3")
    assert promised.read_bytes("a/x") == b"3"
    assert list(promised.names("a", "")) == ["x"]


def test_an_unknown_protocol_is_a_storage_error() -> None:
    with pytest.raises(StorageError, match="cannot open nope://bucket") as caught:
        Store("nope://user:hush@bucket")
    assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://bucket/a@b.tar", "s3://bucket/a@b.tar"),
        ("ftp://user:pass@host/a", "ftp://host/a"),
        ("ftp://user:p@ss@host:21/a?b=c", "ftp://host:21/a?b=c"),
        ("/local/with@sign", "/local/with@sign"),
        ("filecache::ftp://user:pass@host/a", "filecache::ftp://host/a"),
        ("s3://bucket[1]/a.tar", "s3://bucket[1]/a.tar"),
    ],
)
def test_redact(url: str, shown: str) -> None:
    assert redact(url) == shown


def test_listings_of_local_folders(tmp_path: Path) -> None:
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / name).write_bytes(b"12")
    (tmp_path / "folder.tar").mkdir()
    assert [info.url for info in list_folder(f"{tmp_path}/")] == [
        f"{tmp_path}/{n}" for n in ("a.tar", "b.tar", "c.txt")
    ]
    assert [info.url for info in glob_objects(f"{tmp_path}/*.tar")] == [f"{tmp_path}/a.tar", f"{tmp_path}/b.tar"]
    assert object_info(f"{tmp_path}/a.tar") == ObjectInfo(f"{tmp_path}/a.tar", 2, None)
    for absent in (f"{tmp_path}/x.tar", f"{tmp_path}/folder.tar"):
        with pytest.raises(FileNotFoundError):
            object_info(absent)


# On S3


@pytest.fixture
def store(s3_server: S3Server, request: pytest.FixtureRequest) -> Store:
    return Store(f"{s3_server.url}/{request.node.name}", options=s3_server.options)


@pytest.fixture
def proxy(s3_server: S3Server) -> Iterator[Proxy]:
    with proxy_to(s3_server) as proxy:
        yield proxy


def test_s3_create_race_has_one_winner(store: Store) -> None:
    store.require_conditional_writes()
    contents = [bytes([number]) * 100_000 for number in range(RACERS)]
    outcomes = race(lambda: Store(store.url, options=store.options), contents)
    assert outcomes.count(True) == 1
    assert store.read_bytes("shards/00000.tar") == contents[outcomes.index(True)]
    assert not store.create("shards/00000.tar", b"late")


def test_s3_objects(store: Store, tmp_path: Path) -> None:
    assert store.info("shards/1.tar") is None
    assert list(store.names("shards", ".tar")) == []
    local = tmp_path / "local"
    local.write_bytes(BODY)
    assert store.create("shards/1.tar", local)
    info = store.info("shards/1.tar")
    assert info is not None
    assert info.size == len(BODY)
    assert info.etag == hashlib.md5(BODY).hexdigest(), "of a plain PUT; what counts is that it is there, unquoted"
    assert store.create("shards/0.tar", b"")
    assert store.create("shards/deep/2.tar", b"")
    assert list(store.names("shards", ".tar")) == ["0.tar", "1.tar"]
    assert store.info("shards") is None
    fetched = store.local_file("shards/1.tar", tmp_path)
    assert fetched.read_bytes() == BODY
    with store.open_seekable("shards/1.tar") as file:
        file.seek(1_000_000)
        assert file.read(100) == BODY[1_000_000:1_000_100]
    store.replace("shards/1.tar", b"new")
    assert store.read_bytes("shards/1.tar") == b"new"
    with store.open_stream("shards/0.tar") as stream:
        assert stream.read(10) == b""
    for absent in (store.read_bytes, lambda name: store.open_stream(name).read(1)):
        with pytest.raises(FileNotFoundError):
            absent("shards/9.tar")


def test_s3_planning_sees_what_another_client_wrote(store: Store, s3_server: S3Server) -> None:
    """Listings are remembered by the client; ours are fresh each time."""
    store.create("a/0.tar", b"1")
    listings: list[Callable[[], Any]] = [
        lambda: list(store.names("a", ".tar")),
        lambda: [info.url for info in list_folder(f"{store.url}/a", store.options)],
        lambda: [info.url for info in glob_objects(f"{store.url}/a/*.tar", store.options)],
        lambda: object_info(f"{store.url}/a/0.tar", store.options).size,
        lambda: store.info("a/0.tar"),
    ]
    before = [listing() for listing in listings]
    assert before[1] == before[2] == [f"{store.url}/a/0.tar"]
    other, root = url_to_fs(store.url, **s3_server.options, skip_instance_cache=True)
    other.pipe_file(f"{root}/a/0.tar", b"22")
    other.pipe_file(f"{root}/a/1.tar", b"1")
    after = [listing() for listing in listings]
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_s3_stream_is_one_get(store: Store, proxy: Proxy) -> None:
    store.create("a.tar", BODY)
    with open_stream(f"{store.url}/a.tar", proxy.options) as stream:
        assert read_all(stream) == BODY
        assert stream.tell() == len(BODY)
    assert len(proxy.heads) == 1, proxy.heads
    assert "range:" not in proxy.heads[0].lower()


@pytest.mark.parametrize("cuts", [(0,), (1_000_000,), (700_000, 1, 500_000)])
def test_s3_stream_resumes_by_range(store: Store, proxy: Proxy, cuts: tuple[int, ...]) -> None:
    store.create("a.tar", BODY)
    proxy.faults.extend(Fault(cut_after=cut) for cut in cuts)
    with open_stream(f"{store.url}/a.tar", proxy.options) as stream:
        assert read_all(stream) == BODY
    heads = [head.lower() for head in proxy.requests("GET", "a.tar")]
    assert len(heads) == 1 + len(cuts)
    etag = hashlib.md5(BODY).hexdigest()
    assert all(f'if-match: "{etag}"' in head for head in heads[1:]), "resumed only for the same version"
    if sum(cuts):
        assert "range: bytes=" in heads[-1]


def test_s3_object_changed_while_it_is_read(store: Store, proxy: Proxy) -> None:
    """Every reply is cut, so that what was not read before the change must be asked for after it."""
    store.create("a.tar", BODY)
    proxy.faults.extend([Fault(cut_after=500_000)] * 4)
    with open_stream(f"{store.url}/a.tar", proxy.options) as stream:
        assert stream.read(1000) == BODY[:1000]
        store.replace("a.tar", BODY[::-1])
        asked = len(proxy.requests("GET", "a.tar"))
        with pytest.raises(SourceChanged, match=r"a\.tar: it is not the version"):
            read_all(stream)
    assert len(proxy.requests("GET", "a.tar")) == asked + 1, "a changed object is not asked for again"


def test_s3_object_changed_since_planning(store: Store) -> None:
    store.create("a.tar", b"old")
    planned = object_info(f"{store.url}/a.tar", store.options)
    with open_stream(planned.url, store.options, planned.etag) as stream:
        assert stream.read(10) == b"old"
    store.replace("a.tar", b"new")
    with open_stream(planned.url, store.options, planned.etag) as stream, pytest.raises(SourceChanged):
        stream.read(10)


def test_s3_wrong_checksum_is_not_read_over(store: Store, proxy: Proxy) -> None:
    """What was handed out is wrong, and asking for the rest by range would hide it."""
    store.create("a.tar", BODY)
    proxy.faults.append(Fault(header=b"x-amz-checksum-crc32: AAAAAA==\r\n"))
    stream = open_stream(f"{store.url}/a.tar", proxy.options)
    with stream, pytest.raises(StorageError, match="FlexibleChecksumError"):
        read_all(stream)
    assert len(proxy.requests("GET", "a.tar")) == 1


def test_s3_stream_gives_up(store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.storage.MAX_RESUMES", 2)
    store.create("a.tar", BODY)
    proxy.faults.extend([Fault(cut_after=0)] * 3)
    stream = open_stream(f"{store.url}/a.tar", proxy.options)
    with stream, pytest.raises(StorageError, match="broke 3 times in a row at byte 0"):
        stream.read(10)
    assert len(proxy.requests("GET", "a.tar")) == 3


def test_s3_wrong_credentials_are_a_clear_error(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "a-secret-that-must-not-be-shown"
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    options = {"endpoint_url": f"http://localhost:{s3_server.port}"}  # another client than that of the other tests
    store = Store(f"{s3_server.url}/refused", options=options)
    url = f"{store.url}/a.tar"
    calls: list[Callable[[], Any]] = [
        lambda: store.create("a.tar", b"1"),
        lambda: store.replace("a.tar", b"1"),
        lambda: store.info("a.tar"),
        lambda: store.read_bytes("a.tar"),
        lambda: list(store.names("x", "")),
        lambda: store.open_seekable("a.tar"),
        lambda: store.open_stream("a.tar").read(1),
        lambda: object_info(url, options),
        lambda: list_folder(store.url, options),
        lambda: glob_objects(f"{store.url}/*.tar", options),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="s3://bucket/refused") as caught:
            call()
        assert secret not in str(caught.value)


def test_an_unreachable_server_is_a_clear_error(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": {"retries": {"max_attempts": 0}}}
    store = Store("s3://bucket/x", options=options)
    monkeypatch.setattr("s3fs.S3FileSystem.retries", 1)
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/x/a: .*127\.0\.0\.1:9"):
        store.info("a")


def test_a_web_server_that_does_not_answer_is_no_missing_file(tmp_path: Path) -> None:
    """fsspec says "not found" of both; one is the row's fault, the other would reject whatever its hour brings."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.mp4"
        with pytest.raises(FileNotFoundError):
            object_info(url)
        (tmp_path / "a.mp4").write_bytes(b"12345")
        assert object_info(url).size == 5
        server.shutdown()
    with pytest.raises(StorageError, match=r"cannot read http://127\.0\.0\.1"):
        object_info(url)
