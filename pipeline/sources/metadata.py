"""Metadata that others wrote, in a form that can be stored again and read from any language."""

from __future__ import annotations

import json
import math
from typing import Any


def plain_json(text: str | bytes) -> Any:
    """Parse JSON; NaN and infinite numbers, which JSON does not have, become null.

    ValueError (or RecursionError) if it is no JSON or holds text that UTF-8 cannot, such as half a surrogate pair.
    """
    value = json.loads(text, parse_constant=lambda name: None, parse_float=_finite)
    json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _finite(text: str) -> float | None:
    value = float(text)
    return value if math.isfinite(value) else None
