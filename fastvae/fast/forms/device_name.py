"""The name of a device's tables.

A GPU's tables are those of its card, by the driver's name. A CPU's are those of its class: the instruction set that
torch's kernels use, because torch and oneDNN choose their code by it, and because model names are many, hidden by some
hypervisors, and differ between machines of one fleet that must give one answer. The number of cores and caches differ
within a class, so ``fastvae tune`` may find other forms than those shipped.
"""

from __future__ import annotations

import platform
import re

import torch
from fastvae_kernels.shared import tiles

# The names that systems give one architecture.
MACHINES = {"AMD64": "x86_64", "aarch64": "arm64"}


def name_of(device: torch.device) -> str:
    """Return the name: as "nvidia-h100-80gb-hbm3", or "cpu-x86-64-avx2"."""
    if device.type == "cpu":
        machine = platform.machine()
        return _plain(f"cpu {MACHINES.get(machine, machine)} {cpu_class()}")
    return tiles.target_of(device).name if device.type == "cuda" else device.type


def cpu_class() -> str:
    """Return "amx", "avx512", "avx2", or torch's name of another instruction set, as "default" or "sve256"."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    # Under ATEN_CPU_CAPABILITY torch's answer is the asked one; AMX comes with AVX512 alone.
    return "amx" if capability == "avx512" and torch.cpu._is_amx_tile_supported() else capability


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
