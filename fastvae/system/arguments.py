"""Checks of arguments, shared by the commands and the datasets."""

from __future__ import annotations

from typing import Any


def check_unsigned(name: str, value: int, bits: int = 64) -> int:
    """Return ``value``; raises ValueError, naming the argument, unless it is an unsigned integer of ``bits`` bits."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**bits:
        raise ValueError(f"{name} must be an integer from 0 to 2^{bits} - 1, got {value!r}")
    return value


def check_state(state: Any, *names: str) -> None:
    """Raise ValueError unless ``state`` is a dict with all of ``names``, as state_dict() of the same class returns."""
    if not isinstance(state, dict) or (missing := [name for name in names if name not in state]):
        lacks = f"one without {', '.join(missing)}" if isinstance(state, dict) else f"{state!r:.80}"
        raise ValueError(f"state must be what state_dict() gave, got {lacks}")


def check_choices(**choices: tuple[Any, tuple[Any, ...]]) -> None:
    """Raise ValueError for an argument, given as name=(value, allowed values), that is not one of these."""
    for name, (given, allowed) in choices.items():
        if given not in allowed:
            listed = ", ".join(repr(value) for value in allowed if value is not None)
            raise ValueError(f"{name} must be one of {listed}, got {given!r}")


def parse_positive(name: str, value: int | str, most: int) -> int:
    """Return ``value`` as a number from 1 to ``most``; raises ValueError, naming the argument, for anything else."""
    text = str(value)
    if not text.isascii() or not text.isdigit() or len(text) > 9 or int(text) < 1:
        raise ValueError(f"{name} must be 'auto' or at least 1, got {value!r}")
    if int(text) > most:
        raise ValueError(f"{name} must be at most {most}, got {text}")
    return int(text)
