"""Writing to stderr: ignores a closed terminal, and strips control characters of file names."""

from __future__ import annotations

import re
import sys
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


class Stderr:
    """sys.stderr that ignores errors: text that cannot be written is dropped."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    @property
    def is_there(self) -> bool:
        """Return True if this process has a stderr."""
        return self._stream is not None

    def write(self, text: str) -> int:
        """Write ``text`` if possible; return the number of characters written."""
        try:
            return self._stream.write(text) if self._stream is not None else 0
        except (OSError, ValueError):  # full, gone, or closed
            return 0

    def flush(self) -> None:
        """Flush the stream if possible."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            return

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def print_stderr(text: str) -> None:
    """Write ``text``, without control characters, to stderr; errors are ignored."""
    stream = Stderr()
    stream.write(strip_control_characters(text))
    stream.flush()


def strip_control_characters(text: str) -> str:
    """Return ``text`` with ? for control characters, direction marks and bytes that are no text; newlines are kept."""
    return CONTROL.sub("?", text)


def format_bytes(size: int) -> str:
    """Return a number of bytes in the largest of GiB, MiB and KiB of which it is at least a tenth."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if 10 * size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def first_few(names: list[str] | tuple[str, ...], count: int = 3) -> str:
    """Return the first ``count`` names, and the number of the others."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
