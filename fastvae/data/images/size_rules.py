"""Images that are left out for their size: under a least side, or smaller than their bucket."""

from __future__ import annotations

from dataclasses import dataclass

from fastvae.data.images.errors import ImageError
from fastvae.data.rows import Size


@dataclass(frozen=True)
class SizeRules:
    """Rules of a store. ``min_size``: least length of the shorter side in pixels; ``no_upscale``: enlarge no image."""

    min_size: int = 0
    no_upscale: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.min_size, bool) or not isinstance(self.min_size, int) or self.min_size < 0:
            raise ValueError(f"min_size must be a number of pixels, got {self.min_size!r}")
        if not isinstance(self.no_upscale, bool):
            raise ValueError(f"no_upscale must be true or false, got {self.no_upscale!r}")

    def identity(self) -> dict[str, object]:
        """Return the rules that are on, for the identity of a store."""
        fields = {"min_size": self.min_size, "no_upscale": self.no_upscale}
        return {name: value for name, value in fields.items() if value}

    def reason(self, original_hw: Size, bucket: Size) -> str | None:
        """Return why an image is left out, "below_min_size" or "below_bucket"; None for one that is not."""
        if min(original_hw) < self.min_size:
            return "below_min_size"
        return "below_bucket" if self.no_upscale and is_enlarged(original_hw, bucket) else None

    def check(self, original_hw: Size, bucket: Size, name: str) -> None:
        """Raise ImageError for an image that is left out."""
        size = "x".join(map(str, original_hw[::-1]))
        reason = self.reason(original_hw, bucket)
        if reason == "below_min_size":
            raise ImageError(reason, f"{name} is {size}, a side under the {self.min_size} pixels of --min-size")
        if reason:
            wanted = "x".join(map(str, bucket[::-1]))
            raise ImageError(reason, f"{name} is {size} and would be enlarged to its bucket {wanted}: --no-upscale")


ANY_SIZE = SizeRules()


def is_enlarged(original_hw: Size, bucket: Size) -> bool:
    """Return True if an image is smaller than its ``bucket`` in a side, so that it is scaled up to cover it."""
    return original_hw[0] < bucket[0] or original_hw[1] < bucket[1]
