"""The argument max_memory of exact tiling: a number of bytes, a text with a unit, or "auto"."""

from __future__ import annotations

import re

import torch

from fastvae.system.devices import free_memory

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
# Of what is free, for "auto": other programs take memory too.
SHARE = 0.8

MaxMemory = int | str


def check_max_memory(value: MaxMemory) -> MaxMemory:
    """Return "auto", or the bytes of ``value``. Raises ValueError for anything else."""
    if value == "auto":
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]?i?B)", value, re.IGNORECASE) if isinstance(value, str) else None
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise ValueError(f"max_memory must be 'auto', a number of bytes or a text such as '12GiB', got {value!r}")
    return size


def bytes_of(value: MaxMemory, device: torch.device) -> int:
    """Return the bytes that a call may take: those of a checked value, or for "auto" four fifths of what is free."""
    return int(SHARE * free_memory(device)) if isinstance(value, str) else value
