"""The folder in which fastvae keeps files of its own for a user: a cache, safe to delete."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/fastvae, or the platform's usual place; it need not exist."""
    if asked := os.environ.get("XDG_CACHE_HOME"):
        return Path(asked) / "fastvae"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastvae" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastvae"
