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
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from fsspec.asyn import sync
from fsspec.core import url_to_fs

from pipeline.errors import PipelineError, SourceChanged, StorageError
from pipeline.local_files import STAGING, create_file, replace_file

LOCAL_PROTOCOLS = ("file", "local")
S3_PROTOCOLS = ("s3", "s3a")
READ_BLOCK = 8 << 20
MAX_RESUMES = 5
MAX_CONFLICTS = 5
_USER = re.compile(r"(?<=://)[^/?#]*@")


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object in a store."""

    url: str
    size: int | None
    """Bytes; None where the store does not say."""
    etag: str | None


def redact(url: str) -> str:
    """The URL without a user:password part, which fsspec accepts in some protocols."""
    return _USER.sub("", url)


def _client_errors() -> tuple[type[Exception], ...]:
    """What a store's client raises: OSError, and botocore's own tree where it is in use."""
    botocore = sys.modules.get("botocore.exceptions")
    return (OSError,) if botocore is None else (OSError, botocore.BotoCoreError)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    """FileNotFoundError if there is no such object; any other failure is a StorageError that names it."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (IsADirectoryError, NotADirectoryError) as error:
        raise FileNotFoundError(errno.ENOENT, "no such object", redact(url)) from error
    except (*_client_errors(), ImportError) as error:  # ImportError: the protocol's package is missing
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise FileNotFoundError(errno.ENOENT, "no such object", redact(url)) from error
        raise StorageError(f"cannot read {redact(url)}: {type(error).__name__}: {error}") from error


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except _client_errors() as error:
        raise StorageError(f"cannot write {redact(url)}: {type(error).__name__}: {error}") from error


class Store:
    """A root URL and the operations on objects under it. Paths are relative, with forward slashes."""

    def __init__(self, url: str, *, options: dict[str, Any] | None = None, single_driver: bool = False) -> None:
        self.url = url.rstrip("/")
        self.options = dict(options or {})
        self.single_driver = single_driver
        try:
            self._fs, self._root = url_to_fs(self.url, **self.options)
        except (ImportError, ValueError) as error:
            raise StorageError(f"cannot open {redact(url)}: {error}") from error
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
            with _reading(self.full_url(name)):
                details = _fresh(self._fs).info(self.path(name))
        except FileNotFoundError:
            return None
        if details.get("type") == "directory":
            return None
        return ObjectInfo(self.full_url(name), details["size"], _etag(details))

    def read_bytes(self, name: str) -> bytes:
        """The whole object; FileNotFoundError if absent."""
        with _reading(self.full_url(name)):
            return cast(bytes, self._fs.cat_file(self.path(name)))

    def open_seekable(self, name: str) -> BinaryIO:
        """A seekable file that reads ahead in large blocks; FileNotFoundError if absent."""
        with _reading(self.full_url(name)):
            return cast(BinaryIO, self._fs.open(self.path(name), "rb", block_size=READ_BLOCK))

    def open_stream(self, name: str) -> io.RawIOBase:
        """A forward-only reader; FileNotFoundError if absent."""
        with _reading(self.full_url(name)):
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
        try:
            with _reading(self.full_url(folder)):
                entries = _fresh(self._fs).ls(self.path(folder), detail=True)
        except FileNotFoundError:
            return
        found = (e["name"].rsplit("/", 1)[-1] for e in entries if e.get("type") != "directory")
        yield from sorted(name for name in found if name.endswith(suffix))

    def create(self, name: str, content: bytes | Path) -> bool:
        """Create the object only if it is absent. True if this call created it, False if one was there.

        After False the caller must look at what is there: it may be this very content, written by an earlier
        attempt or by a request whose reply was lost.
        """
        with _writing(self.full_url(name)):
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
                if self.info(name) is not None:
                    return False
                if _http_status(error) != 409 or attempt == MAX_CONFLICTS:
                    raise
                time.sleep(0.2 * 2**attempt)  # 409: another writer's request for this name is under way
            else:
                return True
        raise AssertionError("unreachable: the last conflict raises")

    def replace(self, name: str, content: bytes) -> None:
        """Write the object whether or not one is there; readers see the old or the new one whole."""
        with _writing(self.full_url(name)):
            if not self.is_local:
                self._upload(self.path(name), content)
                return
            replace_file(Path(self.path(name)), content, self._staging)

    def _upload(self, path: str, content: bytes | Path, **options: Any) -> None:
        if isinstance(content, Path):
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


def object_info(url: str, options: dict[str, Any] | None = None) -> ObjectInfo:
    """Size and ETag of one URL; FileNotFoundError if absent."""
    with _reading(url):
        fs, path = url_to_fs(url, **(options or {}))
        details = _fresh(fs).info(path)
        if details.get("type") == "directory":
            raise IsADirectoryError(errno.EISDIR, "a folder", url)
        return ObjectInfo(url, details["size"], _etag(details))


def list_folder(url: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """Objects directly under a folder, sorted by URL. FileNotFoundError if there is no such folder."""
    with _reading(url):
        fs, path = url_to_fs(url.rstrip("/"), **(options or {}))
        entries = _fresh(fs).ls(path, detail=True)
    return _infos(fs, [e for e in entries if e.get("type") != "directory"])


def glob_objects(url: str, options: dict[str, Any] | None = None) -> list[ObjectInfo]:
    """Objects that match a glob, sorted by URL."""
    with _reading(url):
        fs, path = url_to_fs(url, **(options or {}))
        found = cast("dict[str, dict[str, Any]]", _fresh(fs).glob(path, detail=True))
    return _infos(fs, [e for e in found.values() if e.get("type") != "directory"])


def _infos(fs: Any, entries: list[dict[str, Any]]) -> list[ObjectInfo]:
    local = "file" in fs.protocol or "local" in fs.protocol
    infos = [ObjectInfo(e["name"] if local else fs.unstrip_protocol(e["name"]), e["size"], _etag(e)) for e in entries]
    return sorted(infos, key=lambda info: info.url)


def open_seekable_url(url: str, options: dict[str, Any] | None = None) -> BinaryIO:
    """A seekable file of one object; FileNotFoundError if absent."""
    with _reading(url):
        fs, path = url_to_fs(url, **(options or {}))
        return cast(BinaryIO, fs.open(path, "rb"))


def open_stream(url: str, options: dict[str, Any] | None = None, etag: str | None = None) -> io.RawIOBase:
    """A forward-only reader of one object.

    S3: a single GET whose body is read as it comes; after a fault the rest is asked for by range, and only of
    the same version (If-Match); SourceChanged if it is there no more. Other stores: sequential reads in large blocks.
    """
    with _reading(url):
        fs, path = url_to_fs(url, **(options or {}))
        return _open_stream(fs, path, etag)


def _open_stream(fs: Any, path: str, etag: str | None) -> io.RawIOBase:
    if isinstance(fs.protocol, tuple) and "s3" in fs.protocol:
        return _S3Stream(fs, path, etag)
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
            try:
                body = self._body or self._open_body()
                data = cast(bytes, sync(self._fs.loop, body.read, size))
            except (FileNotFoundError, PipelineError):
                raise
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
            reply = self._fs.call_s3("get_object", **request)
        except OSError as error:
            if _http_status(error) == 412:
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
        # a refusal stays one; a wrong checksum condemns bytes that were handed out already
        if isinstance(error, PermissionError) or type(error).__name__ == "FlexibleChecksumError":
            raise StorageError(f"cannot read {self._url}: {type(error).__name__}: {error}") from error
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
