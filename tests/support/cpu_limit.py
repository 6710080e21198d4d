"""Limit on the CPU seconds of a test, its child processes included; `make test` sets it by CPU_SECONDS_LIMIT.

CPU seconds and not seconds of the clock: other processes on the machine must not make a test red.
"""

import os

import pytest
from support import forks

# Path or id of a test -> the reason why it may take longer.
LONGER = {
    "tests/report/test_browser.py": "starts Chromium",
    "tests/bench/test_device_script.py": "runs bench/device.sh",
    "tests/bench/timing/test_regressions.py::test_a_wrong_result_has_no_ratio": "starts two processes",
}


def cpu_seconds() -> float:
    """Return user and system time of this process, of its children that have ended, and of forked processes."""
    taken = os.times()
    return taken.user + taken.system + taken.children_user + taken.children_system + sum(forks.CPU_SECONDS)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    limit, begin = float(os.environ.get("CPU_SECONDS_LIMIT", "inf")), cpu_seconds()
    result = yield
    taken = cpu_seconds() - begin
    if taken > limit and not item.get_closest_marker("slow") and not item.nodeid.startswith(tuple(LONGER)):
        pytest.fail(
            f"takes {taken:.1f} CPU seconds, at most {limit:g} are allowed: make it smaller, mark it slow and keep a "
            "short form, or name it with a reason in tests/support/cpu_limit.py",
            pytrace=False,
        )
    return result
