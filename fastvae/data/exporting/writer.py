"""Writers of exports, one a layout: each takes rows by ``add`` and leaves whole files in its folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

PLACES = ("original_hw", "crop_tlhw", "bucket")


class Writer:
    """What all layouts share: a folder, and a ``with`` that finishes the last file, or after an error gives it back."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # the disk is full for these last bytes as well; the first error counts
            self.abandon()

    def close(self) -> None:
        """Finish the last file."""

    def abandon(self) -> None:
        """Give the system its file back as it is."""
