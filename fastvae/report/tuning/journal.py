"""The journal of ``fastvae tune``: every measurement as soon as it is made, so that a killed run goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastvae.system.atomic_files import write_atomically
from fastvae.system.strict_json import strict_json


class Journal:
    """Measurements by name, in a JSON file that is replaced as a whole."""

    def __init__(self, path: Path, made_with: dict[str, Any]):
        """Open the file; measurements that were made with something else (versions, threads) are left out."""
        self.path, self.made_with = path, made_with
        self.entries: dict[str, Any] = {}
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # none yet, or another program's: measured again
            return
        if isinstance(held, dict) and held.get("made_with") == made_with:
            self.entries = held["entries"]

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """Return the entry of this name; if there is none, make it and write the file."""
        if name not in self.entries:
            self.entries[name] = make()
            self.write()
        return self.entries[name]

    def write(self) -> None:
        """Write the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, [strict_json({"made_with": self.made_with, "entries": self.entries}).encode()])
