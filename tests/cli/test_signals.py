"""Failure mode 23: SIGTERM, SIGHUP and Ctrl-C, sent to a real process during a run."""

import os
import re
import signal
import threading
import time

import pytest
from support.forks import FASTVAE
from support.small_store import write_pictures
from support.store_checks import committed

from fastvae.cli.signals import graceful_stop
from fastvae.data.store.verify import verify

WITHIN = 10  # seconds
PICTURES = 36
pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no such signals")


def start(forks, source, out, *more):
    options = ["--vae", "tiny", "--buckets", 128, "--dtype", "fp32", "--shard-mb", 0.03, "--workers", 1]
    return forks.start(FASTVAE, "encode", source, out, *options, "--device", "cpu", "-q", *more)


def wait_for_commits(process, out, count):
    until = time.monotonic() + 60
    while len(list(out.glob("shards/*.json"))) < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    source = tmp_path_factory.mktemp("signals") / "in"
    write_pictures(source, PICTURES)
    return source


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=["SIGTERM", "Ctrl-C", "SIGHUP"])
def test_row_23_a_signal_ends_a_run_in_order_within_ten_seconds(forks, tmp_path, pictures, number):
    out = tmp_path / "out"
    process = start(forks, pictures, out)
    wait_for_commits(process, out, 1)
    started = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    seconds = time.monotonic() - started
    rows = committed(out)
    counts = re.fullmatch(
        r"fastvae: interrupted: (\d+) rows committed, (\d+) lost; run the same command again to go on\n", said
    )
    assert (process.returncode, counts and int(counts[1])) == (75, len(rows)), said
    assert seconds < WITHIN
    assert 0 < len(rows) < PICTURES
    assert verify(out, deep=True).damaged == []
    assert not list(out.rglob("*.tmp.*"))
    assert not list(out.glob("leases/*.lease"))
    print(f"\nrow 23: {signal.Signals(number).name}: exit code 75 after {seconds:.2f} s, {len(rows)} rows committed")  # noqa: T201
    if number == signal.SIGTERM:
        again = start(forks, pictures, out, "--json")
        report, said = again.communicate(timeout=120)
        assert again.returncode == 0, said
        assert f'"resumed": {len(rows)},' in report
        assert committed(out).items() >= rows.items()


def test_row_23_a_second_signal_ends_it_at_once(forks):
    """While the process is cleaning up after the first."""
    hanging = """
import time
from fastvae.cli.signals import graceful_stop
with graceful_stop(75):
    try:
        print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("first", flush=True)
        time.sleep(60)
"""
    process = forks.start(hanging)
    for number, word in enumerate(("ready", "first"), 1):
        assert process.lines(number)[-1] == f"{word}\n"
        process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert process.wait(timeout=10) == 75
    assert time.monotonic() - started < 1


def test_row_23_a_callers_own_handlers_and_other_threads_are_left_alone():
    own = lambda *_: None  # noqa: E731
    before = signal.signal(signal.SIGTERM, own)
    try:
        with graceful_stop(75):
            assert signal.getsignal(signal.SIGTERM) is own
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        entered = []

        def elsewhere():
            with graceful_stop(75):
                entered.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert entered == [signal.default_int_handler]
    finally:
        signal.signal(signal.SIGTERM, before)
