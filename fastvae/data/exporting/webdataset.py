"""Export as WebDataset tars."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from fastvae.data.datasets.dataset import ARRAYS
from fastvae.data.exporting.writer import PLACES, Writer
from fastvae.system.strict_json import json_bytes


class Tar(Writer):
    """latents-000000.tar and so on, for webdataset.WebDataset: NNNNNNNNN.mean.npy, .logvar.npy or .latents.npy, .json,
    and .alpha.npy for a store with masks.

    A sample's name is its number, because WebDataset splits names at dots; its key is in the JSON.
    """

    def __init__(self, folder: Path, size: int):
        super().__init__(folder)
        self._size, self._files, self._rows = size, 0, 0
        self._tar: tarfile.TarFile | None = None

    def add(self, row: dict[str, Any]) -> None:
        """Write the members of one row."""
        if self._tar is None or self._tar.offset >= self._size:
            self.close()
            self._tar = tarfile.TarFile(self.folder / f"latents-{self._files:06d}.tar", "w", None, tarfile.USTAR_FORMAT)
            self._files += 1
        for name in ARRAYS:
            if name in row:
                content = io.BytesIO()
                np.save(content, row[name], allow_pickle=False)
                self._member(f"{name}.npy", content.getvalue())
        self._member("json", json_bytes({name: row[name] for name in ("key", "variant", *PLACES, "columns")}))
        self._rows += 1

    def close(self) -> None:
        """Finish the last tar."""
        if self._tar is not None:
            self._tar.close()

    def abandon(self) -> None:
        """Close the file without the end of a tar."""
        if self._tar is not None and self._tar.fileobj is not None:
            self._tar.fileobj.close()

    def _member(self, ending: str, content: bytes) -> None:
        member = tarfile.TarInfo(f"{self._rows:09d}.{ending}")
        member.size = len(content)
        self._tar.addfile(member, io.BytesIO(content))  # type: ignore[union-attr]
