"""SIGTERM and Ctrl-C: the first ends a verb after complete work is written, the second ends it at once."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def graceful_stop(exit_code: int) -> Iterator[None]:
    """Context manager: the first SIGTERM or SIGINT raises KeyboardInterrupt in the main thread, so that complete units
    are written; a second ends the process with ``exit_code`` at once. Changes nothing in other threads, and no handler
    that the caller has installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    ours = {
        number: before
        for number in (signal.SIGTERM, signal.SIGINT)
        if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler)
    }
    asked: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
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
