"""Why an image was not encoded: a fixed vocabulary, so that failures can be counted and compared."""

REASONS = (
    "empty",
    "unsupported",
    "truncated",
    "decode_error",
    "too_large",
    "too_small",
    "too_thin",
    "unreadable",
    "non_finite",
    "overflow",
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
