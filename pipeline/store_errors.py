"""What goes wrong with a store, said with the URL, the right that may be missing, and no secret."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import StorageError

S3_PROTOCOLS = ("s3", "s3a")
S3_URLS = tuple(f"{protocol}://" for protocol in S3_PROTOCOLS)
_USER = re.compile(r"(?<=://)[^/?#\s]*@")
_SIGNATURE = re.compile(
    r"(?i)([?&](?:x-(?:amz|goog)-)?(?:signature|credential|security-token|sig|(?:access_)?token)=)[^&\s\"']*"
)
READ_RIGHT = "s3:GetObject"
LIST_RIGHT = "s3:ListBucket"
WRITE_RIGHT = "s3:PutObject"


def redact(text: str) -> str:
    """A URL, or a text with URLs in it, without user:password parts and without signatures."""
    return _SIGNATURE.sub(r"\1(hidden)", _USER.sub("", text))


_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("aiohttp", "ClientError"),
    ("httpx", "HTTPError"),
    ("httpx2", "HTTPError"),
)
"""Error trees of the stores' clients (S3, HTTP, the Hugging Face hub) that are not OSErrors."""


def client_errors() -> tuple[type[Exception], ...]:
    """What a store's client may raise: OSError, and the own trees of those that are in use."""
    loaded = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    return OSError, *(getattr(module, name) for module, name in loaded if hasattr(module, name))


@contextmanager
def reading(url: str, right: str = READ_RIGHT) -> Iterator[None]:
    """FileNotFoundError if there is no such object; any other failure is a StorageError that names it."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        if isinstance(error.__cause__, Exception) and _is_outage(error.__cause__):
            raise refused("read", url, error.__cause__, right) from error
        raise FileNotFoundError(errno.ENOENT, "no such object", redact(url)) from error
    except (*client_errors(), ImportError) as error:  # ImportError: the protocol's package is missing
        if getattr(error, "errno", None) == errno.ENAMETOOLONG:
            raise FileNotFoundError(errno.ENOENT, "no such object", redact(url)) from error
        raise refused("read", url, error, right) from error


def _is_outage(cause: Exception) -> bool:
    """Whether fsspec's HTTP client says "not found" of a server that did not answer, or answered that it cannot."""
    if not isinstance(cause, client_errors()[1:]):
        return False
    status = getattr(cause, "status", None)
    return status is None or status == 429 or status >= 500


@contextmanager
def writing(url: str) -> Iterator[None]:
    try:
        yield
    except client_errors() as error:
        raise refused("write", url, error, WRITE_RIGHT) from error


def refused(what: str, url: str, error: Exception, right: str) -> StorageError:
    text = f"cannot {what} {redact(url)}: {type(error).__name__}: {redact(str(error))}"
    if isinstance(error, PermissionError) and url.startswith(S3_URLS):
        text += f" (403: wrong credentials, or they lack {right}; docs/storage.md has the rights a run needs)"
    return StorageError(text)
