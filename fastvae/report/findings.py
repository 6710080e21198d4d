"""Findings of fastvae doctor: a severity and a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at: "ok", a "note" that only slows or limits, or "bad"; facts are for JSON."""

    name: str
    state: str
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)
