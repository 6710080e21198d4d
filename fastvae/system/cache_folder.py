"""The folder in which fastvae keeps files of its own for a user: a cache, safe to delete."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return $FASTVAE_CACHE, else $XDG_CACHE_HOME/fastvae, else the platform's usual place; it need not exist."""
    if own := os.environ.get("FASTVAE_CACHE"):
        return Path(own)
    if asked := os.environ.get("XDG_CACHE_HOME"):
        return Path(asked) / "fastvae"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "fastvae" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastvae"
