"""JSON as RFC 8259 has it, in what a store writes and in what a source brings: no NaN and no infinity."""

from __future__ import annotations

import json
import math
from typing import Any


def json_value(text: str | bytes) -> Any:
    """The value of a JSON text; raises ValueError, and RecursionError for one that is nested too deep."""
    return json.loads(text, parse_constant=_no_constant)


def json_bytes(value: Any, indent: int | None = None) -> bytes:
    """``value`` as JSON in ASCII; raises ValueError for a number that is not finite."""
    # \u escapes carry the lone surrogates that stand for file names that are not UTF-8.
    return json.dumps(value, indent=indent, ensure_ascii=True, allow_nan=False).encode("ascii")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def strict_json(value: Any) -> str:
    """``value`` as JSON that every reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
