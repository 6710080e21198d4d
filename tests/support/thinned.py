"""Fewer combinations of parameters under Triton's interpreter; a GPU runs all of them in seconds."""

import itertools

import pytest
from fastvae_kernels.shared.runtime import INTERPRETED


def thinned(cases, *axes, keep=1):
    """Return every combination of ``cases`` and ``axes`` as pytest's parameters, most of them slow in the interpreter.

    Each case keeps ``keep`` combinations of the axes. The next case keeps the next ones, so together the cases keep
    every value of the axes.
    """
    combinations = list(itertools.product(*axes))
    count, found = len(combinations), []
    for number, case in enumerate(cases):
        kept = {(number + step * count // keep) % count for step in range(keep)}
        for index, rest in enumerate(combinations):
            marks = [pytest.mark.slow] if INTERPRETED and index not in kept else []
            found.append(pytest.param(case, *rest, marks=marks, id="-".join(map(str, (case, *rest)))))
    return found
