"""Times of encoder and decoder, of every contestant (contestants.py) in turns, after a check of every result.

python -m pytest bench/timing/test_networks.py --results FILE [--dry] [--without NAME] [-k encoder]
"""

from __future__ import annotations

import pytest

from bench.timing import cases, networks
from bench.timing.stopwatch import CLOCK

TABLE = {device: [*cases.ENCODERS[device], *cases.DECODERS[device]] for device in cases.ENCODERS}


@pytest.mark.benchmark(timer=CLOCK.now)
def test_network(case, device, roof, stopwatch, results, benchmark, tmp_path, without):
    entry = networks.measure(case, device, roof, stopwatch, benchmark, tmp_path, without)
    results["networks"][case.name] = entry
    failed = networks.failures(entry)
    assert not failed, "\n".join(failed)


def test_the_checks_of_a_call(dry, results):
    """CPU time of the checks before a call or a replay: at most 0.1 ms for Stable Diffusion's encoder."""
    taken = networks.seconds_of_checks(rounds=1 if dry else 1000)
    results["checks"] = taken
    assert dry or taken["encoder"] <= 1e-4, taken
