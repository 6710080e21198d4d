"""ImageReader: pixels, size and hash of one file of a source, by the policies of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants, pool_opacity
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import Picture, image_size, read_image
from fastvae.data.images.size_rules import ANY_SIZE, SizeRules, is_enlarged
from fastvae.data.rows import Size, SourceFile
from fastvae.data.sources.source import Source
from fastvae.system.atomic_files import sha256_of


@dataclass(frozen=True)
class ImageReader:
    """Source, buckets, crops and policies of read_image.

    ``factor``: pixels per latent. ``listed``: the file of each key that the source lists. A plan may have been edited,
    so a file at any other place is not opened. ``sizes``: images that are left out for their size.
    ``excluded``: keys that are left out although they were planned.
    """

    source: Source
    buckets: Buckets
    variants: Variants
    alpha: str
    factor: int
    max_pixels: int
    listed: Mapping[str, SourceFile] | None = None
    animated: str = "first"
    sizes: SizeRules = ANY_SIZE
    excluded: Collection[str] = frozenset()

    def size(self, file: SourceFile) -> Size:
        """Return the upright (height, width) in a file's header; (0, 0) for one that cannot be used."""
        try:
            return image_size(self._content(file), max_pixels=self.max_pixels, name=file.key)
        except ImageError:  # it fails again when its row is encoded, and is quarantined then
            return 0, 0

    def bucket_of(self, original_hw: Size) -> Size:
        """Return the bucket of an image; the first of the table if its size is unknown."""
        return self.buckets.nearest(original_hw) if all(original_hw) else self.buckets.sizes[0]

    def picture(self, file: SourceFile, bucket: Size) -> Picture:
        """Return the image of ``file`` for ``bucket``; raises ImageError if it cannot be used.

        Also if it belongs to another bucket than its unit's: the file was changed after the run was planned, or could
        not be read then. The reason is "unreadable", so the next run tries it again.
        """
        content = self._content(file)
        if self.sizes != ANY_SIZE:
            original_hw = image_size(content, max_pixels=self.max_pixels, name=file.key)
            self.sizes.check(original_hw, bucket, file.key)
        policies = {"alpha": self.alpha, "animated": self.animated, "max_pixels": self.max_pixels}
        picture = read_image(content, **policies, at_least=bucket, name=file.key)  # type: ignore[arg-type]
        if self.bucket_of(picture.original_hw) != bucket:
            found = "x".join(map(str, picture.original_hw))
            raise ImageError("unreadable", f"{file.key} is {found} now, which was not so when the run was planned")
        if is_enlarged(picture.original_hw, bucket):
            return replace(picture, flags=(*picture.flags, "upscaled"))
        return picture

    def mask(self, picture: Picture, bucket: Size, variant: int, key: str) -> np.ndarray | None:
        """Return the opacity of each latent of a row, uint8 [h, w], with alpha="mask"; else None."""
        if self.alpha != "mask":
            return None
        return pool_opacity(picture, bucket, self.factor, self.variants, variant, key)

    def opens(self, file: SourceFile) -> bool:
        """Return True if the bytes of ``file`` can be read now."""
        try:
            content = self._content(file)
            if isinstance(content, Path):
                with content.open("rb") as opened:
                    opened.read(1)
        except (OSError, ImageError):
            return False
        return True

    def sha256(self, file: SourceFile) -> str:
        """Return the sha256 of a file's bytes; "" if they cannot be read."""
        try:
            content = self._content(file)
            return sha256_of(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()
        except (OSError, ImageError):
            return ""

    def _content(self, file: SourceFile) -> Path | bytes:
        if file.key in self.excluded:
            raise ImageError("excluded", f"{file.key} was planned before, and --exclude names it now")
        if self.listed is not None:
            now = self.listed.get(file.key)
            if now is not None and now.is_same_as(file):
                file = now  # the source's files may have been moved since the plan
            elif now is None or now.place != file.place:
                raise ImageError("unreadable", f"{file.key} is not in the source where it was when the run was planned")
        return self.source.read(file, self.max_pixels)
