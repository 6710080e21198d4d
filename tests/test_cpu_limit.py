"""The limit on CPU seconds fails a test that exceeds it, except slow tests and those with a reason."""

import types

import pytest
from support.cpu_limit import LONGER, cpu_seconds, pytest_runtest_call
from support.longest_first import LONGEST

HERE = "tests/test_cpu_limit.py::a_test"


def run(nodeid=HERE, slow=False):
    """Run the hook around 0.05 CPU seconds of work."""
    item = types.SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: (name == "slow" and slow) or None)
    hook, begin = pytest_runtest_call(item), cpu_seconds()
    next(hook)
    while cpu_seconds() < begin + 0.05:
        pass
    with pytest.raises(StopIteration):
        hook.send(None)


def test_a_test_above_the_limit_fails(monkeypatch):
    monkeypatch.setenv("CPU_SECONDS_LIMIT", "0.01")
    with pytest.raises(pytest.fail.Exception, match=r"takes 0\.\d CPU seconds, at most 0\.01 are allowed"):
        run()


@pytest.mark.parametrize(
    ("limit", "given"),
    [("0.01", {"slow": True}), ("0.01", {"nodeid": f"{next(iter(LONGER))}::any"}), ("60", {}), (None, {})],
    ids=["slow", "named with a reason", "below the limit", "no limit"],
)
def test_other_tests_pass(limit, given, monkeypatch):
    monkeypatch.delenv("CPU_SECONDS_LIMIT", raising=False)
    if limit:
        monkeypatch.setenv("CPU_SECONDS_LIMIT", limit)
    run(**given)


def test_every_named_test_is_there(request):
    root = request.config.rootpath
    for name in (*LONGER, *LONGEST):
        path, _, function = name.partition("::")
        assert f"def {function}(" in (root / path).read_text() if function else (root / path).is_file(), name
