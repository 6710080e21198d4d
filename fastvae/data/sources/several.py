"""Images of several folders, patterns and URLs in one call."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import DEFAULT_MAX_PIXELS
from fastvae.data.rows import SourceFile
from fastvae.data.sources.source import MAX_LISTED, Listing, Source
from fastvae.system.terminal import first_few


class SeveralSources:
    """Images of ``sources``, each with its key there; of equal keys all but the first get ``~2`` and so on."""

    def __init__(self, sources: Sequence[Source]):
        self.name = first_few([source.name for source in sources])
        self._sources = list(sources)
        self._by_origin: dict[str, Source] = {}

    def listing(self, exclude: str | os.PathLike[str] | None = None) -> Listing:
        """See Source. An image that two of the sources find in one folder is listed once."""
        listing, seen = Listing(), set[tuple[str, str]]()
        for source in self._sources:
            found = source.listing(exclude)
            listing.ignored += found.ignored
            listing.duplicates += found.duplicates
            listing.notes += [f"{source.name}: {note}" for note in found.notes]
            listing.unreadable += [f"{source.name}: {place}" for place in found.unreadable]
            for folder, images in found.passed_over.items():
                listing.pass_over(folder, images)
            for file in found.files:
                name = file.origin.path if file.origin else "", file.place or file.key
                if name not in seen:
                    self._by_origin[name[0]] = source
                    seen.add(name)
                    listing.files.append(file)
        del listing.unreadable[MAX_LISTED:]
        listing.deduplicate_keys()
        return listing

    def read(self, file: SourceFile, max_pixels: int = DEFAULT_MAX_PIXELS) -> Path | bytes:
        """See Source."""
        source = self._by_origin.get(file.origin.path if file.origin else "")
        if source is None:
            raise ImageError("unreadable", f"{file.key} is in none of {self.name}")
        return source.read(file, max_pixels)
