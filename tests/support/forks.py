"""Real processes for tests, without a start of Python for each: one server imports torch and fastvae once, and forks.

A start costs 2 to 3 s of CPU time, a fork 0.02 s. A forked process has its own process number, environment, arguments
and streams, receives signals, and ends as any Python process does. It has not run the interpreter's start-up: a test of
that, or of what an import does, starts its own. The server runs as a user's CPU does: one thread, no interpreter of
Triton, no HF_HUB_OFFLINE.
"""

import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

FASTVAE = "from fastvae.cli.main import main; main()"
NOT_INHERITED = ("TRITON_INTERPRET", "HF_HUB_OFFLINE", "CI")
CPU_SECONDS = []  # of each process that has ended, its own children included
CLOSED = object()  # a stream that the process does not have, as with 2>&- in a shell


class Process:
    """A forked process, with the methods of subprocess.Popen that tests use; its output is in temporary files."""

    def __init__(self, replies, files):
        self._replies, self._files, self._read = replies, files, b""
        self.returncode = None
        self.pid = int(self._line(60))

    def _line(self, timeout):
        while b"\n" not in self._read:
            if not select.select([self._replies], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a forked process", timeout)
            part = os.read(self._replies, 64)
            assert part, "the server of forks has ended"
            self._read += part
        line, self._read = self._read.split(b"\n", 1)
        return line

    def poll(self):
        """Return the exit code, None while the process runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout=60.0):
        """Return the exit code; raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            code, seconds = self._line(timeout).split()
            self.returncode = int(code)
            CPU_SECONDS.append(float(seconds))
            os.close(self._replies)
        return self.returncode

    def send_signal(self, number):
        """Send a signal if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def lines(self, count, timeout=60.0):
        """Return the first ``count`` lines of stdout as soon as they are there."""
        until = time.monotonic() + timeout
        while len(found := self.output()[0].splitlines(keepends=True)) < count or not found[count - 1].endswith("\n"):
            assert self.poll() is None, self.output()
            assert time.monotonic() < until, self.output()
            time.sleep(0.005)
        return found[:count]

    def output(self):
        """Return what the process has written to stdout and stderr until now, None for a stream of the caller's."""
        return tuple(Path(file.name).read_text() if file else None for file in self._files)

    def communicate(self, timeout=60.0):
        """Return stdout and stderr when the process has ended."""
        self.wait(timeout)
        found = self.output()
        for file in filter(None, self._files):
            file.close()
        return found


class Forks:
    """Client of the server; ``start`` and ``run`` take what ``python -c`` or ``python FILE`` takes."""

    def __init__(self):
        self._socket, served = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment |= {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(served.fileno())], env=environment, pass_fds=[served.fileno()]
        )
        served.close()

    def start(self, program, *arguments, stdout=None, stderr=None, environment=None):
        """Start ``program``: the path of a script, or source code. Streams: a file of the caller's, CLOSED, or kept."""
        files = [tempfile.NamedTemporaryFile() if given is None else None for given in (stdout, stderr)]  # noqa: SIM115
        given = [file or stream for file, stream in zip(files, (stdout, stderr), strict=True)]
        reading, writing = os.pipe()
        descriptors = [writing, *(-1 if stream is CLOSED else _number(stream) for stream in given)]
        variables = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        request = {
            "program": str(program),
            "is_file": isinstance(program, Path),
            "arguments": [str(argument) for argument in arguments],
            "environment": {**variables, "OMP_NUM_THREADS": "1", **(environment or {})},
            "streams": [number >= 0 for number in descriptors],
        }
        data, sent = json.dumps(request).encode(), [number for number in descriptors if number >= 0]
        socket.send_fds(self._socket, [data], sent)
        os.close(writing)
        return Process(reading, files)

    def run(self, program, *arguments, timeout=120.0, **options):
        """Start ``program`` and wait for its end; returns a subprocess.CompletedProcess."""
        process = self.start(program, *arguments, **options)
        try:
            said = process.communicate(timeout)
        except BaseException:
            process.send_signal(signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(arguments, process.returncode, *said)

    def fastvae(self, *arguments, **options):
        """Run the command line."""
        return self.run(FASTVAE, *arguments, **options)

    def close(self):
        """End the server."""
        self._socket.close()
        self._server.wait(60)


def _number(stream) -> int:
    return stream if isinstance(stream, int) else stream.fileno()


@pytest.fixture(scope="session")
def forks():
    """The server of this worker of pytest."""
    server = Forks()
    yield server
    server.close()


def serve(server: socket.socket) -> dict | None:
    """Fork for each request; returns the request in the forked process, None in the server when the client is gone."""
    while True:
        data, descriptors, _, _ = socket.recv_fds(server, 2**20, 3)
        if not data:
            _reap(0)
            return None
        if os.fork() == 0:
            # Waits for the process and reports its end: the server is free for the next request.
            server.close()
            request, replies = json.loads(data), descriptors[0]
            if (child := os.fork()) == 0:
                os.close(replies)
                _take_streams(request["streams"][1:], descriptors[1:])
                return request
            for descriptor in descriptors[1:]:
                os.close(descriptor)
            os.write(replies, b"%d\n" % child)
            _, status, used = os.wait4(child, 0)
            os.write(replies, b"%d %f\n" % (os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime))
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        _reap(os.WNOHANG)


def _reap(options: int) -> None:
    """Wait for processes that have ended, and with 0 for all that still run."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, options)[0]:
            continue


def _take_streams(present: list[bool], descriptors: list[int]) -> None:
    """Make ``descriptors`` stdout and stderr, as the interpreter's start-up does; close the one that is not present."""
    given = iter(descriptors)
    for number, (name, is_there) in enumerate(zip(("stdout", "stderr"), present, strict=True), 1):
        if is_there:
            descriptor = next(given)
            os.dup2(descriptor, number)
            os.close(descriptor)
            options = {"errors": "backslashreplace", "buffering": 1} if name == "stderr" else {}
            setattr(sys, name, open(number, "w", encoding="utf-8", closefd=False, **options))  # noqa: SIM115
        else:
            os.close(number)
            setattr(sys, name, None)
        setattr(sys, f"__{name}__", getattr(sys, name))


def main() -> None:
    """Import, serve, and in each forked process do what was asked for."""
    gc.disable()  # what is imported stays
    import torch

    import fastvae.cli.main
    import fastvae.data.decoding.decode
    import fastvae.data.encoding.encode
    import fastvae.data.encoding.repair
    import fastvae.data.exporting.export  # noqa: F401

    torch.set_num_threads(1)
    gc.freeze()  # the collector would copy the pages that the processes share
    gc.enable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, ignores it
    request = serve(socket.socket(fileno=int(sys.argv[1])))
    if request is None:
        os._exit(0)  # nanobind reports frozen objects as leaks
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = [request["program"] if request["is_file"] else "-c", *request["arguments"]]
    os._exit(_exit_code(request))


def _exit_code(request: dict) -> int:
    """Run the program and end as the interpreter does, but for the freeing of every module, which takes 0.6 s."""
    code = 0
    try:
        if request["is_file"]:
            runpy.run_path(request["program"], run_name="__main__")
        else:
            exec(compile(request["program"], "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:  # noqa: BLE001 (the interpreter prints it too)
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = 120
    return code


if __name__ == "__main__":
    main()
