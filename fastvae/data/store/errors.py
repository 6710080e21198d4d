"""Errors of a store."""

from __future__ import annotations

from pathlib import Path


class StoreError(ValueError):
    """A folder that cannot be used as a store; the message says why."""


class StoreLocked(StoreError):
    """A folder whose lock another process has held for too long."""


class IdentityMismatch(StoreError):
    """A store made by another model, numerics or preprocessing; ``differences`` has a line for each field."""

    def __init__(self, path: Path, lines: list[str]):
        self.differences = lines
        listed = "\n".join(f"  {line}" for line in lines)
        advice = "nothing was changed; encode into a new folder, or with the store's settings"
        super().__init__(f"{path} holds latents of another identity ({advice}):\n{listed}")
