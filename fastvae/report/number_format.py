"""How figures are written for people, alike on the terminal and on the page."""

from __future__ import annotations

import math
from collections.abc import Sequence


def number(value: float | None, digits: int = 3) -> str:
    """``value`` with so many digits that count and no exponent where it can be read without; "" for None."""
    if value is None:
        return ""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.{digits - 1}g}"
    return f"{value:,.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}"


def interval(values: Sequence[float] | None) -> str:
    """Two ends as text, or "" for None."""
    return "" if values is None else f"{number(values[0])} to {number(values[1])}"


def megabytes(value: int | None) -> str:
    """Bytes in millions, or "" for None."""
    return "" if value is None else f"{value / 1e6:,.0f}"
