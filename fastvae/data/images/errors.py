"""Why an image was not encoded: a fixed vocabulary, so that failures can be counted and compared."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator

# This machine's trouble, not the file's.
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
)


class ImageError(ValueError):
    """An image that cannot be used: ``reason`` is one of REASONS, ``detail`` one sentence that names the file."""

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
    """Around the reading of ``name``: an OSError becomes ImageError("unreadable"), unless the machine is at fault."""
    try:
        yield
    except OSError as error:
        if error.errno in MACHINE:
            raise
        said = error.strerror or " ".join(str(error).split()) or type(error).__name__
        raise ImageError("unreadable", f"{name} cannot be read: {said}") from error


def check_bytes(size: int, max_pixels: int, name: str) -> None:
    """Raises ImageError("too_large") for a file of more bytes than an image within the limit has."""
    # Four 16-bit channels uncompressed, and 64 MiB of metadata.
    if size > 8 * max_pixels + 2**26:
        raise ImageError("too_large", f"{name} has {size} bytes, more than {max_pixels} pixels can need")
