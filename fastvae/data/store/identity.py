"""What a store's latents were made from and how, as one digest: the model, the numerics, the preprocessing.

Two runs may share a store only if their identities are equal. Where the weights came from (a path, a Hub id, a file's
own hash) is provenance: it is recorded beside the identity and does not count, because the same weights under another
name give the same latents.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


def canonical_json(value: Any) -> str:
    """JSON with one spelling for each value: sorted keys, no spaces, ASCII only; raises ValueError for NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(identity: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of ``identity``, as hexadecimal digits."""
    return hashlib.sha256(canonical_json(identity).encode("ascii")).hexdigest()


def differences(stored: Any, given: Any, path: str = "") -> list[str]:
    """One line for each field in which two identities differ: its path, the store's value, this run's value."""
    if isinstance(stored, dict) and isinstance(given, dict):
        lines = []
        for name in sorted(stored.keys() | given.keys()):
            lines += differences(stored.get(name), given.get(name), f"{path}.{name}" if path else name)
        return lines
    if stored == given:
        return []
    return [f"{path}: the store has {json.dumps(stored)}, this run {json.dumps(given)}"]
