"""The folder in which fastvae keeps files of its own for a user: a cache, safe to delete."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """Return $FASTVAE_CACHE, else $XDG_CACHE_HOME/fastvae, else the platform's usual place; it need not exist.

    Raises OSError if the usual place is in a home folder and the user has none.
    """
    if own := os.environ.get("FASTVAE_CACHE"):
        return Path(own)
    if asked := os.environ.get("XDG_CACHE_HOME"):
        return Path(asked) / "fastvae"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local") / "fastvae" / "Cache"
    return _home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "fastvae"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError as error:
        raise OSError(f"FASTVAE_CACHE must name a folder, for this user has no home folder ({error})") from error
