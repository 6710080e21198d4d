"""JSON by RFC 8259, without NaN and infinity, for stores and sources."""

from __future__ import annotations

import json
import math
from typing import Any


def json_value(text: str | bytes) -> Any:
    """Return the value of a JSON text; raises ValueError, or RecursionError for one that is nested too deep."""
    return json.loads(text, parse_constant=_no_constant)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """Return ``value`` as JSON in ASCII; raises ValueError for a number that is not finite."""
    # \u escapes keep the lone surrogates of file names that are not UTF-8.
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False).encode("ascii")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def strict_json(value: Any) -> str:
    """Return ``value`` as JSON in which numbers that are not finite are null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
