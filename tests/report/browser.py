"""A real browser, driven over a pipe: what a page says on its console, fetches, and looks like."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",  # CI runs as root, where Chromium refuses to start with it
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "about:blank",
]
PATIENCE = 30.0
AS_3_AND_4 = """
import fcntl, os, sys
reading, writing = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless Chromium; speaks the DevTools protocol over descriptors 3 and 4, ended by zero bytes."""

    def __init__(self, reading: int, writing: int):
        self._reading, self._writing = reading, writing
        self._numbers = itertools.count(1)
        self._buffer = b""
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and wait for its answer; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(self, path: Path, *, width: int = 1000, dark: bool = False) -> None:
        """Show a file in a window of so many pixels, and forget what happened before."""
        self.visit(path.as_uri(), width=width, dark=dark)

    def visit(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        """The same for an address."""
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")

    def complaints(self) -> list[str]:
        """Errors and warnings on the console, exceptions, and what the browser itself had to say of the page."""
        said = []
        for event in self.events:
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    said.append(str(event["params"]["exceptionDetails"]["text"]))
                case "Runtime.consoleAPICalled":
                    said.append(f"console.{event['params']['type']}")
                case "Log.entryAdded":
                    said.append(event["params"]["entry"]["text"])
        return said

    def requested(self) -> list[str]:
        """The addresses that were asked for, those inside the page (data:) apart; the page's own comes first."""
        wanted = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in wanted]
        return [url for url in urls if not url.startswith("data:")]

    def ask(self, expression: str) -> Any:
        """The value of an expression of JavaScript, evaluated by the debugger and not by the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + PATIENCE
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, "the browser does not answer"
            piece = os.read(self._reading, 2**16)
            assert piece, "the browser went away"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """A browser with a profile of its own in the folder ``profile``, and its end."""
    assert CHROMIUM is not None
    from_us, to_us = os.pipe(), os.pipe()
    # It reads descriptor 3 and writes 4, and subprocess can pass on only the numbers that there are.
    command = [sys.executable, "-c", AS_3_AND_4, str(from_us[0]), str(to_us[1]), CHROMIUM, f"--user-data-dir={profile}"]
    log = profile / "chromium.log"
    profile.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, *OPTIONS],
            pass_fds=(from_us[0], to_us[1]),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    os.close(from_us[0])
    os.close(to_us[1])
    try:
        yield Browser(to_us[0], from_us[1])
    finally:
        os.close(from_us[1])
        os.close(to_us[0])
        process.terminate()
        process.wait(PATIENCE)
