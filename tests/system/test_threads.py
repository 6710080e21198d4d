"""Calls with a time limit."""

import contextlib
import gc
import os
import signal
import threading
import time
import weakref

import pytest

from fastvae.system.threads import call_within


def test_a_call_in_time_gives_its_result_or_its_error():
    assert call_within(60, lambda: 3) == 3
    with pytest.raises(KeyError, match="missing"):
        call_within(60, lambda: {}["missing"])


def test_a_call_that_takes_too_long_is_left_to_itself():
    end = threading.Event()
    left, after = [], []
    try:
        with pytest.raises(TimeoutError, match=r"no result in 0\.1 s"):
            call_within(0.1, lambda: (left.append(threading.current_thread()), end.wait(60)))
        call_within(60, lambda: after.append(threading.current_thread()))
        assert left[0].is_alive()
        assert after[0] is not left[0]
    finally:
        end.set()


def test_calls_share_a_thread_that_ends_with_their_own():
    seen = []

    def calls():
        seen.extend(call_within(60, threading.current_thread) for _ in range(3))

    thread = threading.Thread(target=calls)
    thread.start()
    thread.join()
    assert len({*seen}) == 1
    seen[0].join(60)
    assert not seen[0].is_alive()


def test_an_interrupted_wait_delays_no_later_call(monkeypatch):
    end = threading.Event()
    call_within(60, int)  # its thread has started

    def hang():
        while not end.is_set():
            time.sleep(0.01)

    def interrupted(event, timeout=None):
        raise KeyboardInterrupt

    try:
        with monkeypatch.context() as patch:
            patch.setattr("fastvae.system.threads.threading.Event.wait", interrupted)
            with pytest.raises(KeyboardInterrupt):
                call_within(60, hang)
        assert call_within(60, lambda: 3) == 3
    finally:
        end.set()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_a_thread_of_its_own():
    assert call_within(60, lambda: 3) == 3
    child = os.fork()
    if child == 0:
        os._exit(call_within(60, lambda: 4))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4


def test_an_error_keeps_nothing_of_its_call_in_memory():
    class Large:
        """An object that a weak reference can follow."""

    kept = []

    def fail():
        large = Large()
        kept.append(weakref.ref(large))
        raise ValueError("no image")

    gc.disable()
    try:
        with contextlib.suppress(ValueError):
            call_within(60, fail)
        assert kept[0]() is None
    finally:
        gc.enable()


@pytest.mark.skipif(os.name != "posix", reason="this system cannot suspend a process")
def test_a_process_that_is_suspended_does_not_use_its_time_up(forks):
    script = """
import sys, threading, time
from fastvae.system.threads import call_within
def work():
    print("begun", flush=True)
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    return "done"
print(call_within(3, work), flush=True)
"""
    process = forks.start(script)
    process.lines(1)
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate()[0] == "begun\ndone\n"


def test_a_call_that_hangs_does_not_keep_the_process_from_ending(forks):
    script = """
import time
from fastvae.system.threads import call_within
try:
    call_within(0.1, lambda: time.sleep(600))
except TimeoutError as error:
    print(error)
"""
    process = forks.start(script)
    assert process.communicate()[0] == "no result in 0.1 s\n"
    assert process.returncode == 0
