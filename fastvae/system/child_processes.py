"""Child processes that call functions for this one: the end of a child, by a signal too, is an error here.

A child is a new interpreter, not a fork: it shares no lock, thread or device context with its parent, and it does not
import the parent's main module, so a script without ``if __name__ == "__main__"`` is not run a second time. It ends
when its parent ends, however that happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import IO, Any, Self, TypeVar

from fastvae.system.threads import call_within

Result = TypeVar("Result")
# With -P no module of the working directory is imported before the parent's sys.path is set.
COMMAND = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from fastvae.system.child_processes import serve; serve()"
)
# Seconds that a child has to end after its requests were closed, before it is killed.
GRACE = 0.2
# Seconds until a child that closed its answers has an exit code: on a loaded machine more than GRACE.
EXIT_SECONDS = 20
# Seconds in which a child must have answered a call, unless its caller says otherwise.
ANSWER_SECONDS = 600


class ChildEnded(RuntimeError):
    """Error of a child that ended during a call; ``how``: "signal 11 (SIGSEGV)" or "exit code 1"."""

    def __init__(self, how: str):
        super().__init__(f"the child process ended with {how}")
        self.how = how


class ChildTimedOut(RuntimeError):
    """Error of a child that had no answer in time, and was killed."""


class ChildProcess:
    """Context manager with a child that calls one function at a time; leaving it ends the child.

    The child is started by the first call, and after its end by the next one. For one thread at a time.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Process number of the child; None if none runs."""
        return None if self._process is None or self._process.poll() is not None else self._process.pid

    def call(self, function: Callable[..., Result], *arguments: Any, seconds: float = ANSWER_SECONDS) -> Result:
        """Return ``function(*arguments)``, called in the child. All are pickled, the function by its name.

        Raises the function's exception, ChildEnded if the child ends before it answers, ChildTimedOut if it has no
        answer in ``seconds``, and RuntimeError if it ends before it can be asked. An interruption of the wait (Ctrl-C)
        ends the child.
        """
        request = pickle.dumps((function, arguments), pickle.HIGHEST_PROTOCOL)
        process = self._started()
        try:
            result, error = pickle.loads(call_within(seconds, lambda: _exchange(process, request)))
        except TimeoutError:
            process.kill()
            self.close()
            raise ChildTimedOut(f"the child process had no answer in {seconds:g} s") from None
        except (EOFError, BrokenPipeError):
            # A child that ends has closed its answers already. Closing its requests as well would end it with code 0.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(EXIT_SECONDS)
            raise ChildEnded(self.close()) from None
        except BaseException:
            process.kill()  # its answer is still to come, and would be taken for that of the next call
            self.close()
            raise
        if error is not None:
            raise error
        return result

    def close(self) -> str:
        """End the child and return how it ended; it holds nothing that has to be saved."""
        process, self._process = self._process, None
        if process is None:
            return "no start"
        with contextlib.suppress(BrokenPipeError):  # part of a request is still in the buffer
            process.stdin.close()  # type: ignore[union-attr]
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()
        code = process.wait()
        process.stdout.close()  # type: ignore[union-attr] (a thread that reads it has found its end)
        return _describe(code)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        self._process = process = subprocess.Popen(
            [sys.executable, "-P", "-c", COMMAND, json.dumps([os.fspath(path) for path in sys.path])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if _has_stderr() else subprocess.DEVNULL,
            start_new_session=True,  # a terminal sends Ctrl-C to the parent alone, which ends the child
        )
        try:
            _receive(process.stdout)
        except EOFError:
            raise RuntimeError(f"a child process ended with {self.close()} before its first call") from None
        except BaseException:
            self.close()
            raise
        return process


def serve() -> None:
    """Call the functions that the parent sends, until it ends or closes the pipe; called in the child alone."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # text that a C library prints on stdout is no answer
    requests: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()
    _send(answers, b"")
    while True:
        answer = _answer(requests.get())
        try:
            _send(answers, answer)
        except BrokenPipeError:
            os._exit(0)


def _read_requests(requests: queue.SimpleQueue[bytes]) -> None:
    """Queue the parent's requests; end this process, also in the middle of a call, when the parent has gone."""
    # Unbuffered: a thread that waits in sys.stdin's lock makes Python abort at its exit.
    with open(0, "rb", buffering=0, closefd=False) as pipe, contextlib.suppress(EOFError):
        while True:
            requests.put(_receive(pipe))
    os._exit(0)


def _answer(request: bytes) -> bytes:
    """Return the pickled result and None, or None and the error that the parent has to raise."""
    try:
        function, arguments = pickle.loads(request)
        return pickle.dumps((function(*arguments), None), pickle.HIGHEST_PROTOCOL)
    except Exception as error:  # noqa: BLE001 (raised in the parent)
        try:
            answer = pickle.dumps((None, error), pickle.HIGHEST_PROTOCOL)
            pickle.loads(answer)
        except Exception:  # noqa: BLE001 (of a class that cannot be pickled, or not read again)
            return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return answer


def _exchange(process: subprocess.Popen[bytes], request: bytes) -> bytes:
    """Return the answer to a request."""
    _send(process.stdin, request)
    return _receive(process.stdout)


def _send(pipe: IO[bytes] | None, message: bytes) -> None:
    assert pipe is not None
    pipe.write(len(message).to_bytes(8, "little") + message)
    pipe.flush()


def _receive(pipe: IO[bytes] | None) -> bytes:
    """Return the next message; raises EOFError if the other process ends before it is complete."""
    assert pipe is not None
    return _read(pipe, int.from_bytes(_read(pipe, 8), "little"))


def _read(pipe: IO[bytes], size: int) -> bytes:
    parts = []
    while size:
        part = pipe.read(size)
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {-code} ({signal.Signals(-code).name})"
    except ValueError:  # a real-time signal
        return f"signal {-code}"


def _has_stderr() -> bool:
    """Return True if this process has a stderr: a shell's 2>&- closes it, and another file may have its number."""
    try:
        return sys.__stderr__ is not None and os.fstat(sys.__stderr__.fileno()) is not None
    except (OSError, ValueError):
        return False
