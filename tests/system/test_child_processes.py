"""Child processes: results, errors, and each way in which a child or its parent ends."""

import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from support import child_functions

from fastvae.system.child_processes import ChildEnded, ChildProcess, ChildTimedOut

pytestmark = pytest.mark.skipif(os.name != "posix", reason="this system has no signals between processes")


@pytest.fixture(scope="module")
def child():
    with ChildProcess() as started:
        yield started


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie has ended: its parent, or a container's first process, has not asked for its exit code.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_one_child_answers_all_calls_and_imports_neither_torch_nor_the_main_module(child):
    pid, torch_is_there, has_no_main = child.call(child_functions.process)
    assert pid not in (0, os.getpid())
    assert pid == child.pid
    assert (torch_is_there, has_no_main) == (False, True)
    large = np.arange(100_000)  # more than a pipe's buffer, both ways
    assert (child.call(child_functions.add, large, 1) == large + 1).all()
    assert child.pid == pid


def test_an_error_of_the_function_is_raised_and_the_child_goes_on(child):
    child.call(child_functions.add, 1, 1)
    pid = child.pid
    with pytest.raises(ImportError, match="a plain error"):
        child.call(child_functions.fail, "a plain error")
    with pytest.raises(RuntimeError, match="Unpicklable: one two"):
        child.call(child_functions.fail, "unpicklable")
    with pytest.raises((TypeError, AttributeError, RuntimeError), match="lock"):
        child.call(threading.Lock)  # a result that cannot be pickled
    with pytest.raises((TypeError, AttributeError), match="pickle"):
        child.call(lambda: 1)
    assert child.call(child_functions.add, 1, 2) == 3
    assert child.pid == pid


def test_text_on_stdout_is_no_answer(child):
    assert child.call(child_functions.print_on_stdout) == "answer"


@pytest.mark.parametrize(
    ("function", "argument", "how"),
    [
        (child_functions.end_by_signal, signal.SIGSEGV, "signal 11 (SIGSEGV)"),
        (child_functions.end_with_code, 7, "exit code 7"),
    ],
)
def test_the_end_of_a_child_is_an_error_that_names_it_and_the_next_call_starts_another(child, function, argument, how):
    child.call(child_functions.add, 1, 1)
    pid = child.pid
    with pytest.raises(ChildEnded) as ended:
        child.call(function, argument)
    assert ended.value.how == how
    assert child.pid is None
    assert child.call(child_functions.add, 1, 2) == 3
    assert child.pid not in (None, pid)


def test_a_child_that_is_killed_between_two_calls_is_replaced(child):
    child.call(child_functions.add, 1, 1)
    pid = child.pid
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: child.pid is None)
    assert child.call(child_functions.add, 1, 2) == 3


def test_a_child_that_is_killed_while_the_parent_waits_ends_the_wait(child, tmp_path):
    def kill():
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(ChildEnded, match=r"signal 9 \(SIGKILL\)"):
        child.call(child_functions.note_and_wait, tmp_path / "pid")
    killer.join()


def test_a_child_that_takes_too_long_is_killed_and_the_next_call_starts_another(child, tmp_path):
    child.call(child_functions.add, 1, 1)
    pid = child.pid
    started = time.monotonic()
    with pytest.raises(ChildTimedOut, match=r"the child process had no answer in 0\.3 s"):
        child.call(child_functions.note_and_wait, tmp_path / "pid", seconds=0.3)
    assert time.monotonic() - started < 60
    assert not is_running(pid)
    assert child.call(child_functions.add, 1, 2) == 3


def test_a_child_that_holds_pythons_lock_is_killed_although_it_reads_no_request(child):
    large = np.zeros(2**20)  # more than a pipe's buffer
    with pytest.raises(ChildTimedOut, match=r"no answer in 0\.3 s"):
        child.call(child_functions.stop_itself, seconds=0.3)
    assert child.call(child_functions.add, large, 1).all()


def test_a_child_that_cannot_start_is_no_end_during_a_call(monkeypatch):
    monkeypatch.setattr("fastvae.system.child_processes.COMMAND", "raise SystemExit(3)")
    with ChildProcess() as child, pytest.raises(RuntimeError, match="exit code 3 before its first call"):
        child.call(child_functions.add, 1, 1)


# Waits in a child for longer than any test, without a guard for the main module.
WAITING = """
import sys
from support import child_functions
from fastvae.system.child_processes import ChildProcess
try:
    with ChildProcess() as child:
        child.call(child_functions.note_and_wait, sys.argv[1])
except KeyboardInterrupt:
    print("interrupted", child.pid)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_the_end_of_the_parent_ends_a_child_in_the_middle_of_a_call(forks, tmp_path, number):
    parent = forks.start(WAITING, tmp_path / "pid")
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    pid = int((tmp_path / "pid").read_text())
    assert is_running(pid)
    parent.send_signal(number)
    output, _ = parent.communicate()
    assert output == ("interrupted None\n" if number == signal.SIGINT else "")
    wait_for(lambda: not is_running(pid))
