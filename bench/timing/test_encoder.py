"""The encoder beside its rivals (contestants.py): each first held to the truth, then all timed in turns.

python -m pytest bench/timing/test_encoder.py --results FILE [--dry] [--without NAME]
"""

from __future__ import annotations

import pytest

from bench.timing import cases, networks
from bench.timing.stopwatch import CLOCK

TABLE = cases.ENCODERS


@pytest.mark.benchmark(timer=CLOCK.now)
def test_encoder(case, device, roof, stopwatch, results, benchmark, tmp_path, without):
    entry = networks.measure(case, device, roof, stopwatch, benchmark, tmp_path, without)
    results["networks"][case.name] = entry
    failed = networks.failures(entry)
    assert not failed, "\n".join(failed)
