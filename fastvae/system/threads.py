"""Threads that work ahead: a map whose results come in order, and writes that run beside the work for the next."""

from __future__ import annotations

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
    """function(argument) for each argument, in order, by ``workers`` threads working at most 2 * workers ahead."""
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


class BackgroundWriter:
    """Runs one write at a time in a thread, beside the work for the next; to be used in a ``with``.

    Whatever was submitted is written, also when the ``with`` is left by an error or an interruption.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="fastvae-write")
        self._writes: deque[Future[None]] = deque()
        self.seconds = 0.0

    def submit(self, write: Callable[[], None]) -> None:
        """Queue ``write``, and wait until the one before it is done; raises that one's error."""
        # Queued before the wait: an interruption while waiting loses nothing that was finished.
        self._writes.append(self._pool.submit(self._timed, write))
        if len(self._writes) > 1:
            self._writes.popleft().result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        # After another error that one is told: it came first, and what was not written is encoded again.
        while self._writes and kind is None:
            self._writes.popleft().result()

    def _timed(self, write: Callable[[], None]) -> None:
        started = time.perf_counter()
        try:
            write()
        finally:
            self.seconds += time.perf_counter() - started
