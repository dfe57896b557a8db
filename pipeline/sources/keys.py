"""Which keys may become names of files and tar members."""

from __future__ import annotations

from pipeline.errors import ClipError, RejectionClass
from pipeline.formats.contract import key_problem
from pipeline.records import printable

MAX_KEY_BYTES = 200


def require_safe_key(key: str) -> None:
    """ClipError(UNSAFE_KEY) unless the key is safe as the first part of an output name.

    Besides what every output format demands (`key_problem`): no backslash and at most 200 bytes of UTF-8, which some
    file systems could not hold.
    """
    problem = key_problem(key)
    if problem is None and "\\" in key:
        problem = "key has a backslash"
    if problem is None and len(key.encode()) > MAX_KEY_BYTES:
        problem = f"key has {len(key.encode())} bytes of UTF-8, limit {MAX_KEY_BYTES}"
    if problem is not None:
        raise ClipError(RejectionClass.UNSAFE_KEY, "read", f"{printable(key)!r}: {problem}")
