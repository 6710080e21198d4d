"""Functions that tests call in a child process, which imports them by name; it cannot see what a test has patched."""

import os
import signal
import sys
import time
from pathlib import Path


class Unpicklable(ValueError):
    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def add(first, second):
    return first + second


def process():
    return os.getpid(), "torch" in sys.modules, sys.modules["__main__"].__spec__ is None


def end_by_signal(number=signal.SIGKILL):
    os.kill(os.getpid(), number)


def end_with_code(code):
    sys.exit(code)


def fail(kind):
    raise Unpicklable("one", "two") if kind == "unpicklable" else ImportError(kind)


def stop_itself():
    """Stop all threads of this process: none reads a request or sees a closed pipe."""
    os.kill(os.getpid(), signal.SIGSTOP)


def print_on_stdout():
    os.write(1, b"text of a C library")
    print("text")  # noqa: T201
    return "answer"


def note_and_wait(path):
    """Write this process's number to ``path``, then wait for longer than any test."""
    Path(path).write_text(str(os.getpid()))
    time.sleep(600)
