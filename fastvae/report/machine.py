"""Machine and versions of a measurement. Only ``machine`` imports torch."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = ("torch", "triton", "diffusers", "numpy", "pillow")
BF16 = ("avx512_bf16", "amx_bf16", "bf16")


def versions() -> dict[str, str]:
    """Return the versions of fastvae, Python and the installed PACKAGES, without importing them."""
    from fastvae._version import __version__

    found = {"fastvae": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """Return the facts of ``device`` and its driver as values for JSON; memory in bytes."""
    import torch

    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "processor": processor(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": card.name,
            "gpu_memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
            "driver": driver() or "unknown",
            "cuda": torch.version.cuda or f"ROCm {torch.version.hip}",
        }
    return found


def processor() -> str:
    """Return the processor's name from the system, and its bf16 instructions."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(errors="replace") if listed.exists() else ""
    lines = [line.partition(":") for line in text.splitlines()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    native = [flag for flag in BF16 if flag in flags]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({', '.join(native) or 'no bf16'})" if text else name


def driver() -> str | None:
    """Return the version of the NVIDIA driver, or None if nvidia-smi is missing or finds no card."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]
