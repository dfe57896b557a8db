"""One clip that is a file of its own, local or on a store."""

from __future__ import annotations

import hashlib
from contextlib import ExitStack
from typing import Any

from pipeline.decode.blob import Blob
from pipeline.errors import ClipError, RejectionClass
from pipeline.storage import open_stream
from pipeline.store_errors import redact

_CHUNK = 1 << 20


def fetch_clip(url: str, options: dict[str, Any] | None, *, max_bytes: int) -> tuple[Blob, str]:
    """The file's bytes, which the caller closes, and their sha256. ClipError if it is gone or too large; errors of
    the store pass."""
    digest, blob = hashlib.sha256(), Blob.create()
    with ExitStack() as undo:
        undo.callback(blob.close)
        try:
            with open_stream(url, options) as stream:
                while chunk := stream.read(_CHUNK):
                    digest.update(chunk)
                    blob.write(chunk)
                    if blob.size > max_bytes:
                        raise ClipError(RejectionClass.TOO_LARGE, "read", f"{redact(url)}: over {max_bytes} bytes")
        except (FileNotFoundError, ValueError) as error:  # ValueError: no path or URL at all, such as one with a NUL
            raise ClipError(RejectionClass.MISSING_FILE, "read", f"{redact(url)!r}: no such file") from error
        undo.pop_all()
    return blob, digest.hexdigest()
