"""The one door to storage: fsspec behind what the commit protocol needs.

Local paths and `file://` link a synced file to its name to create an object only if it is absent (local_files.py);
S3 uses a conditional PUT (If-None-Match). Any other store must be declared `single_driver`, because it promises
no such thing: then "absent" is checked first and a second driver could slip in between.

Credentials come from the environment (or the instance's role), never from a config, so that no document of ours
can hold one.
"""

from __future__ import annotations

import errno
import io
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from pipeline.errors import SourceChanged, StorageError
from pipeline.local_files import STAGING, LocalFile, create_file, replace_file
from pipeline.store_errors import LIST_RIGHT, READ_RIGHT, S3_PROTOCOLS, S3_URLS, reading, redact, refused, writing

LOCAL_PROTOCOLS = ("file", "local")
PARTS_AT_ONCE = 4
"""Parts of 50 MiB of one upload that are in memory and under way."""
READ_BLOCK = 8 << 20
MAX_RESUMES = 5
MAX_CONFLICTS = 5


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object in a store."""

    url: str
    size: int | None
    """Bytes; None where the store does not say."""
    etag: str | None


@dataclass(frozen=True, slots=True)
class StampedObject:
    """What a listing says of an object."""

    etag: str | None
    modified_unix: float | None
    """By the store's clock; None where it does not say."""


def open_url(url: str, options: dict[str, Any] | None = None) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. S3 gets our retries and deadlines (s3_client.py)."""
    if url.startswith(S3_URLS) and find_spec("s3fs"):
        from pipeline.s3_client import s3_options

        options = s3_options(options or {})
    return url_to_fs(url, **(options or {}))


class Store:
    """A root URL and the operations on objects under it. Paths are relative, with forward slashes."""

    def __init__(self, url: str, *, options: dict[str, Any] | None = None, single_driver: bool = False) -> None:
        self.url = url.rstrip("/")
        self.options = dict(options or {})
        self.single_driver = single_driver
        try:
            self._fs, self._root = open_url(self.url, self.options)
        except (ImportError, ValueError, TypeError) as error:  # TypeError: an option its client does not know
            raise StorageError(f"cannot open {redact(url)}: {redact(str(error))}") from error
        protocol = self._fs.protocol
        self.protocol: str = protocol if isinstance(protocol, str) else protocol[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _make_store, (self.url, self.options, self.single_driver)

    @property
    def is_local(self) -> bool:
        return self.protocol in LOCAL_PROTOCOLS

    def require_conditional_writes(self) -> None:
        """StorageError unless this store can create an object only if it is absent, or one driver is promised."""
        if self.is_local or self.protocol in S3_PROTOCOLS or self.single_driver:
            return
        raise StorageError(
            f"{redact(self.url)}: the {self.protocol} store has no conditional write that this project knows of, "
            "so two drivers could overwrite each other. Set output.single_driver: true if only one will ever run."
        )

    def path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def full_url(self, name: str) -> str:
        return redact(f"{self.url}/{name}" if name else self.url)

    def info(self, name: str) -> ObjectInfo | None:
        """Size and ETag; None if there is no such object."""
        try:
            with reading(self.full_url(name)):
                details = _fresh(self._fs).info(self.path(name))
        except FileNotFoundError:
            return None
        if details.get("type") == "directory":
            return None
        return ObjectInfo(self.full_url(name), details["size"], _etag(details))

    def read_bytes(self, name: str) -> bytes:
        """The whole object; FileNotFoundError if absent."""
        if self.protocol not in S3_PROTOCOLS:
            with reading(self.full_url(name)):
                return cast(bytes, self._fs.cat_file(self.path(name)))
        with self.open_stream(name) as stream:  # one request; s3fs asks for the size first
            return b"".join(iter(lambda: stream.read(READ_BLOCK) or b"", b""))

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes [start, stop) in one read, fewer where the object ends; FileNotFoundError if absent."""
        with reading(self.full_url(name)):
            if not self.is_local:
                return cast(bytes, self._fs.cat_file(self.path(name), start=start, end=stop))
            with open(self.path(name), "rb", buffering=0) as file:
                return os.pread(file.fileno(), stop - start, start)

    def open_local(self, name: str) -> LocalFile:
        """An object of a local store, to read into memory that is there; FileNotFoundError if absent."""
        with reading(self.full_url(name)):
            return LocalFile(self.path(name))

    def open_seekable(self, name: str) -> BinaryIO:
        """A seekable file that reads ahead in large blocks; FileNotFoundError if absent."""
        with reading(self.full_url(name)):
            return cast(BinaryIO, self._fs.open(self.path(name), "rb", block_size=READ_BLOCK))

    def open_stream(self, name: str) -> io.RawIOBase:
        """A forward-only reader; FileNotFoundError if absent."""
        with reading(self.full_url(name)):
            return _open_stream(self._fs, self.path(name), etag=None)

    def local_file(self, name: str, folder: Path) -> Path:
        """A local file with the object's bytes: itself in a local store, else fetched into `folder` with one GET.

        FileNotFoundError if absent.
        """
        if self.is_local:
            path = Path(self.path(name))
            if not path.is_file():
                raise FileNotFoundError(path)
            return path
        target = folder / name.replace("/", "-")
        with self.open_stream(name) as stream, target.open("wb") as out:
            while chunk := stream.read(READ_BLOCK):
                out.write(chunk)
        return target

    def names(self, folder: str, suffix: str) -> Iterator[str]:
        """Names (without folder) of the objects directly in a folder that end with suffix, sorted."""
        yield from self.etags(folder, suffix)

    def etags(self, folder: str, suffix: str) -> dict[str, str | None]:
        """The ETag by name of the objects directly in a folder that end with suffix, sorted by name: one listing.

        None where the store has no ETags. Empty if there is no such folder.
        """
        try:
            with reading(self.full_url(folder), LIST_RIGHT):
                found = self._local_names(folder) if self.is_local else self._listed(folder)
        except FileNotFoundError:
            return {}
        return dict(sorted((name, etag) for name, etag in found if name.endswith(suffix)))

    def modified(self, folder: str, suffix: str) -> dict[str, StampedObject]:
        """ETag and time of the last change of the objects directly in a folder that end with suffix, by name: one
        listing. Empty if there is no such folder."""
        try:
            with reading(self.full_url(folder), LIST_RIGHT):
                entries = _fresh(self._fs).ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return {}
        found = {e["name"].rsplit("/", 1)[-1]: e for e in entries if e.get("type") != "directory"}
        return {name: StampedObject(_etag(e), _changed(e)) for name, e in found.items() if name.endswith(suffix)}

    def _local_names(self, folder: str) -> list[tuple[str, None]]:
        """Without a stat of each file, which fsspec's listing makes."""
        with os.scandir(self.path(folder)) as entries:
            return [(entry.name, None) for entry in entries if not entry.is_dir()]

    def _listed(self, folder: str) -> list[tuple[str, str | None]]:
        entries = _fresh(self._fs).ls(self.path(folder), detail=True)
        return [(e["name"].rsplit("/", 1)[-1], _etag(e)) for e in entries if e.get("type") != "directory"]

    def create(self, name: str, content: bytes | Path) -> bool:
        """Create the object only if it is absent. True if this call created it, False if one was there.

        After False the caller must look at what is there: it may be this very content, written by an earlier
        attempt or by a request whose reply was lost.
        """
        with writing(self.full_url(name)):
            if self.is_local:
                return create_file(Path(self.path(name)), content, self._staging)
            if self.protocol in S3_PROTOCOLS:
                return self._create_s3(name, content)
            self.require_conditional_writes()
            if _fresh(self._fs).exists(self.path(name)):
                return False
            self._upload(self.path(name), content)
            return True

    def _create_s3(self, name: str, content: bytes | Path) -> bool:
        for attempt in range(MAX_CONFLICTS + 1):
            try:
                self._upload(self.path(name), content, mode="create")
            except FileExistsError:
                return False
            except PermissionError:
                raise
            except OSError as error:
                # Some S3-compatible servers answer the failed condition in a form that s3fs maps to a plain
                # OSError; whether an object is there now decides.
                if self._is_there(name):
                    return False
                if _http_status(error) != 409 or attempt == MAX_CONFLICTS:
                    raise
                time.sleep(0.2 * 2**attempt)  # 409: another writer's request for this name is under way
            else:
                return True
        raise AssertionError("unreachable: the last conflict raises")

    def _is_there(self, name: str) -> bool:
        """False, too, if the store does not say: the error at hand is the one to report then."""
        try:
            return self.info(name) is not None
        except StorageError:
            return False

    def replace(self, name: str, content: bytes) -> None:
        """Write the object whether or not one is there; readers see the old or the new one whole."""
        with writing(self.full_url(name)):
            if not self.is_local:
                self._upload(self.path(name), content)
                return
            replace_file(Path(self.path(name)), content, self._staging)

    def remove(self, name: str) -> None:
        """Remove an object; nothing happens if it is absent."""
        with writing(self.full_url(name)):
            try:
                self._fs.rm_file(self.path(name))
            except FileNotFoundError:
                return

    def _upload(self, path: str, content: bytes | Path, **options: Any) -> None:
        if isinstance(content, Path):
            if self.protocol in S3_PROTOCOLS:
                options["max_concurrency"] = PARTS_AT_ONCE
            self._fs.put_file(str(content), path, **options)
        else:
            self._fs.pipe_file(path, content, **options)

    @property
    def _staging(self) -> Path:
        return Path(self.path(STAGING))


def _make_store(url: str, options: dict[str, Any], single_driver: bool) -> Store:
    return Store(url, options=options, single_driver=single_driver)


def _fresh(fs: Any) -> Any:
    """The file system without the listings it remembers: planning and resume must see what is there now."""
    fs.invalidate_cache()
    return fs


def _http_status(error: BaseException) -> int | None:
    """The status of the reply that s3fs made this error of."""
    reply = getattr(error.__cause__, "response", None) or {}
    return reply.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _etag(details: dict[str, Any]) -> str | None:
    value = details.get("ETag") or details.get("etag")
    return str(value).strip('"') if value else None


def _changed(details: dict[str, Any]) -> float | None:
    """fsspec's file systems each have their own name for it, and a number or a datetime."""
    values = (details.get(name) for name in ("LastModified", "mtime", "last_modified", "updated", "created"))
    value = next((value for value in values if value is not None), None)
    return value.timestamp() if isinstance(value, datetime) else value if isinstance(value, float | int) else None


def object_info(url: str, options: dict[str, Any] | None = None) -> ObjectInfo:
    """Size and ETag of one URL; FileNotFoundError if absent."""
    with reading(url):
        fs, path = open_url(url, options)
        details = _fresh(fs).info(path)
        if details.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "a folder", url)
        return ObjectInfo(url, details["size"], _etag(details))


def list_folder(url: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """Objects directly under a folder, sorted by URL. FileNotFoundError if there is no such folder."""
    with reading(url, LIST_RIGHT):
        fs, path = open_url(url.rstrip("/"), options)
        entries = _fresh(fs).ls(path, detail=True)
    return _infos(fs, [e for e in entries if e.get("type") != "directory"])


def glob_objects(url: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """Objects that match a glob, sorted by URL."""
    with reading(url, LIST_RIGHT):
        fs, path = open_url(url, options)
        found = cast("dict[str, dict[str, Any]]", _fresh(fs).glob(path, detail=True))
    return _infos(fs, [e for e in found.values() if e.get("type") != "directory"])


def _infos(fs: Any, entries: list[dict[str, Any]]) -> list[ObjectInfo]:
    local = "file" in fs.protocol or "local" in fs.protocol
    infos = [ObjectInfo(e["name"] if local else fs.unstrip_protocol(e["name"]), e["size"], _etag(e)) for e in entries]
    return sorted(infos, key=lambda info: info.url)


def open_seekable_url(url: str, options: dict[str, Any] | None = None) -> BinaryIO:
    """A seekable file of one object; FileNotFoundError if absent."""
    with reading(url):
        fs, path = open_url(url, options)
        return cast(BinaryIO, fs.open(path, "rb"))


def open_stream(url: str, options: dict[str, Any] | None = None, etag: str | None = None) -> io.RawIOBase:
    """A forward-only reader of one object.

    S3: a single GET whose body is read as it comes; after a fault the rest is asked for by range, and only of
    the same version (If-Match); SourceChanged if it is there no more. Other stores: sequential reads in large blocks.
    """
    with reading(url):
        fs, path = open_url(url, options)
        return _open_stream(fs, path, etag)


def _open_stream(fs: Any, path: str, etag: str | None) -> io.RawIOBase:
    if isinstance(fs.protocol, tuple) and "s3" in fs.protocol:
        return _S3Stream(fs, path, etag)
    if "file" in fs.protocol and Path(path).exists() and not Path(path).is_file():
        # a FIFO would be waited for, and a device may never end
        raise FileNotFoundError(errno.ENOENT, "no regular file", path)
    return cast(io.RawIOBase, fs.open(path, "rb", **_block_options(fs)))


def _block_options(fs: Any) -> dict[str, Any]:
    if "file" in fs.protocol or "memory" in fs.protocol:
        return {}
    return {"block_size": READ_BLOCK, "cache_type": "readahead"}


class _S3Stream(io.RawIOBase):
    """The body of one GET, resumed by range where it breaks."""

    def __init__(self, fs: Any, path: str, etag: str | None) -> None:
        self._fs = fs
        self._bucket, self._key, _ = fs.split_path(path)
        self._etag = etag
        self._position = 0
        self._body: Any = None
        self._end: int | None = None

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self._read_some(len(view))
        view[: len(data)] = data
        return len(data)

    def _read_some(self, size: int) -> bytes:
        for attempt in range(MAX_RESUMES + 1):
            if self._end is not None and self._position >= self._end and self._body is None:
                return b""
            body = self._body or self._open_body()
            try:
                data = cast(bytes, sync(self._fs.loop, body.read, size))
            except Exception as error:  # noqa: BLE001 - aiobotocore raises a dozen unrelated types for a cut body
                self._fault(error, attempt)
                continue
            if data or self._position >= (self._end or 0):
                self._position += len(data)
                if not data:
                    self._drop_body()  # the read past the end has checked the whole body's checksum
                return data
            self._fault(OSError("body ended early"), attempt)
        raise AssertionError("unreachable: the last fault raises")

    def _open_body(self) -> Any:
        request: dict[str, Any] = {"Bucket": self._bucket, "Key": self._key}
        if self._position:
            request["Range"] = f"bytes={self._position}-"
        if self._etag:
            request["IfMatch"] = f'"{self._etag}"'
        try:
            with reading(self._url):  # the client has tried again as often as it should
                reply = self._fs.call_s3("get_object", **request)
        except StorageError as error:
            if error.__cause__ is not None and _http_status(error.__cause__) == 412:
                raise SourceChanged(f"{self._url}: it is not the version (ETag {self._etag}) it was") from error
            raise
        self._body = reply["Body"]
        if self._position and not reply.get("ContentRange", "").startswith(f"bytes {self._position}-"):
            raise StorageError(f"{self._url}: the store ignores ranges; cannot resume at byte {self._position}")
        self._etag = self._etag or reply.get("ETag", "").strip('"')
        self._end = self._position + int(reply["ContentLength"])
        return self._body

    @property
    def _url(self) -> str:
        return f"s3://{self._bucket}/{self._key}"

    def _fault(self, error: Exception, attempt: int) -> None:
        self._drop_body()
        # a wrong checksum condemns bytes that were handed out already
        if type(error).__name__ == "FlexibleChecksumError":
            raise refused("read", self._url, error, READ_RIGHT) from error
        if attempt >= MAX_RESUMES:
            raise StorageError(
                f"{self._url}: reading broke {MAX_RESUMES + 1} times in a row "
                f"at byte {self._position}: {type(error).__name__}: {error}"
            ) from error
        time.sleep(0.2 * 2**attempt)

    def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            self._fs.loop.call_soon_threadsafe(body.close)  # the connection belongs to that loop's thread

    def close(self) -> None:
        if not self.closed:
            self._drop_body()
        super().close()
