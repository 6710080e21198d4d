"""Base class of the writers of exports, one a layout, which take rows by ``add`` and write files to a folder."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Self

PLACES = ("original_hw", "crop_tlhw", "bucket")


class Writer:
    """A folder, and a context manager that finishes the last file, or after an error closes it unfinished."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
            return
        with contextlib.suppress(OSError):  # a full disk refuses these last bytes too; raise the first error
            self.abandon()

    def close(self) -> None:
        """Finish the last file."""

    def abandon(self) -> None:
        """Close the last file unfinished."""
