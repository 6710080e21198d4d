"""Chromium, driven over a pipe: console messages, requests and screenshots of a page."""

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
    "--no-sandbox",  # as root, as in CI, Chromium does not start with a sandbox
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--no-first-run",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
    "about:blank",
]
TIMEOUT_SECONDS = 30.0
AS_3_AND_4 = """
import fcntl, os, sys
reading, writing = (fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3])
os.dup2(reading, 3)
os.dup2(writing, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Browser:
    """One page of a headless Chromium, by the DevTools protocol: messages on descriptors 3 and 4 end in a zero byte."""

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
        """Call a method of the protocol and wait for its answer; earlier events are kept."""
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
        """Open a file in a window of ``width`` pixels, and drop earlier events."""
        self.visit(path.as_uri(), width=width, dark=dark)

    def visit(self, url: str, *, width: int = 1000, dark: bool = False) -> None:
        """Open an address like a file."""
        self.events.clear()
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Page.navigate", url=url)
        self._wait_for("Page.loadEventFired")

    def messages(self) -> list[str]:
        """Return console messages, exceptions and the browser's own log entries."""
        found = []
        for event in self.events:
            match event.get("method"):
                case "Runtime.exceptionThrown":
                    found.append(str(event["params"]["exceptionDetails"]["text"]))
                case "Runtime.consoleAPICalled":
                    found.append(f"console.{event['params']['type']}")
                case "Log.entryAdded":
                    found.append(event["params"]["entry"]["text"])
        return found

    def requested(self) -> list[str]:
        """Return the requested addresses without data: URLs; the page's own is the first."""
        sent = [event for event in self.events if event.get("method") == "Network.requestWillBeSent"]
        urls = [event["params"]["request"]["url"] for event in sent]
        return [url for url in urls if not url.startswith("data:")]

    def ask(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, evaluated by the debugger and not by the page."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        """Return the complete page as PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def _wait_for(self, method: str) -> None:
        while not any(event.get("method") == method for event in self.events):
            self.events.append(self._receive())

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while b"\0" not in self._buffer:
            assert time.monotonic() < deadline, "the browser does not answer"
            piece = os.read(self._reading, 2**16)
            assert piece, "the browser has ended"
            self._buffer += piece
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browsing(profile: Path) -> Iterator[Browser]:
    """Start a browser with a new profile in the folder ``profile``, and end it afterwards."""
    assert CHROMIUM is not None
    from_us, to_us = os.pipe(), os.pipe()
    # Chromium reads descriptor 3 and writes 4; subprocess passes descriptors on with their own numbers only.
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
        process.wait(TIMEOUT_SECONDS)
