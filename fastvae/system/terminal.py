"""What is said of a run on stderr: a terminal that went away stops no run, and no name of a file drives one."""

from __future__ import annotations

import re
import sys
from typing import Any

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]")


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


def print_stderr(text: str) -> None:
    """``text``, made printable, on stderr, if there is one that takes it."""
    stream = Stderr()
    stream.write(strip_control_characters(text))
    stream.flush()


def strip_control_characters(text: str) -> str:
    """``text`` without control characters, direction marks and bytes that are no text; newlines stay."""
    return CONTROL.sub("?", text)


def format_bytes(size: int) -> str:
    """A number of bytes in the largest of GiB, MiB and KiB of which it is a tenth at least."""
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if 10 * size >= bytes_:
            return f"{size / bytes_:.1f} {unit}"
    return f"{size / 2**10:.1f} KiB"


def first_few(names: list[str] | tuple[str, ...], count: int = 3) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
