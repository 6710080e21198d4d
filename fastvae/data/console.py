"""stderr for a run whose result lies elsewhere: a terminal that went away must not stop hours of encoding."""

from __future__ import annotations

import sys
from typing import Any


class Stderr:
    """sys.stderr without its errors: what cannot be shown is dropped."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    @property
    def is_there(self) -> bool:
        """Whether this process has a stderr at all."""
        return self._stream is not None

    def write(self, text: str) -> int:
        """Show ``text`` if that is possible."""
        try:
            return self._stream.write(text) if self._stream is not None else 0
        except (OSError, ValueError):  # full, gone, or closed
            return 0

    def flush(self) -> None:
        """Flush what can be flushed."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(text: str) -> None:
    """``text`` on stderr, if there is one that takes it."""
    stream = Stderr()
    stream.write(text)
    stream.flush()
