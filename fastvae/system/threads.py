"""A map in threads with results in order, writes in a background thread, and calls with a time limit."""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self, TypeVar

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def ordered_map(
    function: Callable[[Argument], Result],
    arguments: Iterable[Argument],
    workers: int,
    initializer: Callable[[], None] = lambda: None,
) -> Iterator[Result]:
    """Yield function(argument) of each argument, in order; ``workers`` threads run at most 2 * workers ahead."""
    waiting: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(workers, thread_name_prefix="fastvae", initializer=initializer)
    try:
        for argument in arguments:
            waiting.append(pool.submit(function, argument))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def call_within(seconds: float, function: Callable[[], Result]) -> Result:
    """Return function(), called in a thread of its own; raises TimeoutError if it takes longer.

    Nothing can end a thread: it is left to itself then, and does not keep the process from ending. Whole seconds are
    counted, not a clock's: a process that is suspended does not use its time up.
    """
    outcomes: list[tuple[Result | None, BaseException | None]] = []
    done = threading.Event()

    def call() -> None:
        try:
            outcomes.append((function(), None))
        except BaseException as error:  # noqa: BLE001 (raised below)
            outcomes.append((None, error))
        done.set()

    threading.Thread(target=call, name="fastvae-call", daemon=True).start()
    for _ in range(math.ceil(seconds)):
        if done.wait(min(seconds, 1)):
            break
    else:
        raise TimeoutError(f"no result in {seconds:g} s")
    result, error = outcomes.pop()
    if error is not None:
        try:
            raise error
        finally:
            del error  # whose traceback has this frame: without a circle, an image is freed at once
    return result  # type: ignore[return-value]


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
