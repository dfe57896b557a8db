"""Which keys may become names of files and tar members."""

from __future__ import annotations

import unicodedata

from pipeline.errors import ClipError, RejectionClass

MAX_KEY_BYTES = 200


def require_safe_key(key: str) -> None:
    """ClipError(UNSAFE_KEY) unless the key is safe as the first part of an output name.

    A key may hold folders ("a/b") but no empty, "." or ".." part, no dot in its last part (WebDataset cuts names
    there), no backslash, control or undecodable character, and at most 200 bytes of UTF-8.
    """
    problem = _problem(key)
    if problem is not None:
        raise ClipError(RejectionClass.UNSAFE_KEY, "read", f"key {printable(key)!r} {problem}")


def _problem(key: str) -> str | None:
    try:
        encoded = key.encode("utf-8")
    except UnicodeEncodeError:
        return "is not valid UTF-8"
    parts = key.split("/")
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, '.' or '..' part"
    if "." in parts[-1]:
        return "has a dot, where readers would cut it"
    if "\\" in key or any(unicodedata.category(character) == "Cc" for character in key):
        return "has a backslash or a control character"
    if len(encoded) > MAX_KEY_BYTES:
        return f"has {len(encoded)} bytes of UTF-8, limit {MAX_KEY_BYTES}"
    return None


def printable(key: str) -> str:
    """The key with undecodable bytes shown as \\xNN, so that it can be stored in UTF-8."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
