"""Cases of the short run (make test). The others are marked slow, and make test-all runs them."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def short_run(cases: Iterable[Any], kept: Collection[Any]) -> list[Any]:
    """Return the cases for parametrize, with a slow mark on those that are not in ``kept``.

    A case is one value, or a tuple with a value for each parameter. Raises ValueError for a kept case that is no case.
    """
    cases = list(cases)
    if unknown := [case for case in kept if case not in cases]:
        raise ValueError(f"kept must be cases, got {unknown}")
    values = [case if isinstance(case, tuple) else (case,) for case in cases]
    marks = [() if case in kept else (pytest.mark.slow,) for case in cases]
    return [pytest.param(*value, marks=mark) for value, mark in zip(values, marks, strict=True)]
