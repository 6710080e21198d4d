"""SIGTERM, SIGHUP and Ctrl-C: the first ends a verb after complete work is written, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

HANGUP = getattr(signal, "SIGHUP", None)  # Windows has none
STOPPING = [number for number in (signal.SIGTERM, signal.SIGINT, HANGUP) if number is not None]


@contextlib.contextmanager
def graceful_stop(exit_code: int) -> Iterator[None]:
    """Context manager: the first signal of STOPPING raises KeyboardInterrupt in the main thread, so that complete units
    are written; a second ends the process with ``exit_code`` at once, but not a SIGHUP: a closed terminal may send
    several. Changes nothing in other threads, and no handler that the caller has installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {
        number: before
        for number in STOPPING
        if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if asked and number == HANGUP:
            return
        asked.append(number)
        if len(asked) > 1:
            os._exit(exit_code)
        raise KeyboardInterrupt

    for number in ours:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, before in ours.items():
            signal.signal(number, before)
