"""ImageError, with one of a fixed list of reasons, so that failures can be counted."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

# Errors of the machine, not of the file.
MACHINE = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)

REASONS = (
    "empty",
    "unsupported",
    "truncated",
    "decode_error",
    "too_large",
    "too_small",
    "too_thin",
    "animated",
    "unreadable",
    "non_finite",
    "overflow",
    "worker_died",
    "timed_out",
    "below_min_size",
    "below_bucket",
    "excluded",
)
# Images that an option leaves out; they do not count as failures of a run.
LEFT_OUT = ("animated", "below_min_size", "below_bucket", "excluded")


class ImageError(ValueError):
    """Error of an image: ``reason`` is one of REASONS, ``detail`` a sentence that names the file."""

    def __init__(self, reason: str, detail: str):
        if reason not in REASONS:
            raise ValueError(f"reason must be one of {REASONS}, got {reason!r}")
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@contextlib.contextmanager
def unreadable(name: str) -> Iterator[None]:
    """Context manager: turns an OSError while ``name`` is read into ImageError, unless the machine is the cause."""
    try:
        yield
    except OSError as error:
        if error.errno in MACHINE:
            raise
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise ImageError("unreadable", f"{name} cannot be read: {reason}") from error


def check_bytes(size: int, max_pixels: int, name: str) -> None:
    """Raise ImageError("too_large") for a file of more bytes than ``max_pixels`` pixels can have."""
    # Four 16-bit channels uncompressed, and 64 MiB of metadata.
    if size > 8 * max_pixels + 2**26:
        raise ImageError("too_large", f"{name} has {size} bytes, more than {max_pixels} pixels can need")
