"""Findings of fastvae doctor: a severity and a sentence."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

OK, NOTE, BAD = "ok", "note", "bad"


@dataclass(frozen=True)
class Finding:
    """Result of one check: "ok", a "note" about a limit or low speed, or "bad". facts: values for JSON."""

    name: str
    state: str
    sentence: str
    facts: dict[str, Any] = field(default_factory=dict)
