"""Metadata that others wrote, in a form that can be stored again and read from any language."""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 100
"""Python's JSON reads and writes about as deep as its stack has room, which differs from one thread to the next: what
one could read, another could not store."""


def plain_json(text: str | bytes) -> Any:
    """Parse JSON; NaN and infinite numbers, which JSON does not have, become null.

    ValueError (or RecursionError) if it is no JSON, nests deeper than MAX_DEPTH or holds text that UTF-8 cannot, such
    as half a surrogate pair.
    """
    value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    if _nests_deeper(value, MAX_DEPTH):
        raise ValueError(f"nests more than {MAX_DEPTH} deep")
    return value


def _nests_deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            inner
            for one in level
            if isinstance(one, dict | list)
            for inner in (one.values() if isinstance(one, dict) else one)
        ]
    return any(isinstance(one, dict | list) for one in level)


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
