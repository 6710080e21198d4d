"""Formats of numbers for the terminal and for HTML pages."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """Return ``value`` with ``digits`` significant digits, without an exponent from 0.001 on; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def interval(values: Sequence[float] | None) -> str:
    """Return the ends of an interval as text, or "" for None."""
    return "" if values is None else f"{number(values[0])} to {number(values[1])}"


def megabytes(value: int | None) -> str:
    """Return bytes in millions as text, or "" for None."""
    return "" if value is None else f"{value / 1e6:,.0f}"
