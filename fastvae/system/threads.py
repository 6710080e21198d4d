"""A map in threads with results in order, writes in a background thread, calls with a time limit, usable cores."""

from __future__ import annotations

import math
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    workers: int,
    initializer: Callable[[], None] = lambda: None,
    ahead: int = 0,
    at_end: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Yield function(argument) of each argument, in order; ``workers`` threads run at most 2 * workers + ahead ahead.

    ``at_end`` is called at the end, an error's or an interruption's too, before the calls that have begun are awaited.
    """
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastvae", initializer=initializer)
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * workers + ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        at_end()
        pool.shutdown(wait=True, cancel_futures=True)


def usable_cores() -> int | None:
    """Return the cores that this process may use; None where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return function(), called in another thread; raises TimeoutError if it takes longer.

    Nothing can end a thread: it is left to itself then, and does not keep the process from ending. Whole seconds are
    counted, not a clock's: a process that is suspended does not use its time up.
    """
    # One for all calls of this thread: a thread for each takes 0.06 ms of CPU and 0.4 ms until it answers, this 0.02.
    caller = getattr(_callers, "caller", None)
    if caller is None or not caller.thread.is_alive():  # a fork has no threads of its parent
        caller = _Caller()
    _callers.caller = None  # while it may be left in the middle of a call
    call = _Call(function)
    caller.calls.put(call)
    for _ in range(math.ceil(seconds)):
        if call.done.wait(min(seconds, 1)):
            break
    else:
        raise TimeoutError(f"no result in {seconds:g} s")
    _callers.caller = caller
    result, error = call.outcomes.pop()
    if error is not None:
        try:
            raise error
        finally:
            del error  # whose traceback has this frame: without a circle, an image is freed at once
    return result


class _Call:
    """A function, and its result or error once it is ``done``."""

    def __init__(self, function: Callable[[], Any]):
        self.function, self.done = function, threading.Event()
        self.outcomes: list[tuple[Any, BaseException | None]] = []

    def __call__(self) -> None:
        try:
            self.outcomes.append((self.function(), None))
        except BaseException as error:  # noqa: BLE001 (raised by call_within)
            self.outcomes.append((None, error))
        self.done.set()


class _Caller:
    """A thread that makes the calls of another, until this object is no more: at the end of that other thread."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=_make_calls, args=(self.calls,), name="fastvae-call", daemon=True)
        self.thread.start()

    def __del__(self) -> None:
        self.calls.put(None)


def _make_calls(calls: queue.SimpleQueue[_Call | None]) -> None:
    while (call := calls.get()) is not None:
        call()
        del call  # with what the function holds


_callers = threading.local()


class BackgroundWriter:
    """Context manager that runs one write at a time in a thread, during the work for the next.

    Every submitted write is done, also if an error or an interruption ends the ``with`` block.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastvae-write")
        self._writes: deque[Future[None]] = deque()
        self.seconds = 0.0

    def submit(self, write: Callable[[], None]) -> None:
        """Queue ``write``, and wait for the previous write; raises the error of the previous one."""
        # Queued before the wait, so that an interruption of the wait loses no finished work.
        self._writes.append(self._pool.submit(self._timed, write))
        if len(self._writes) > 1:
            self._writes.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        # Another error came first and is raised; the rows that were not written are encoded by the next run.
        while self._writes and kind is None:
            self._writes.popleft().result()

    def _timed(self, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write()
        finally:
            self.seconds += time.perf_counter() - started
