"""The machine and the versions that a measurement was made with. Imports torch only where it is asked about it."""

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
    """The version of fastvae, Python, and each package of PACKAGES that is installed, without importing any."""
    from fastvae._version import __version__

    found = {"fastvae": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What ``device`` is and what drives it, in values that JSON takes; memory in bytes."""
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
    """The processor's name as its maker gives it, and the bf16 instructions that it has."""
    listed = Path("/proc/cpuinfo")
    text = listed.read_text(errors="replace") if listed.exists() else ""
    lines = [line.partition(":") for line in text.splitlines()]
    names = [value.strip() for key, _, value in lines if key.strip() == "model name"]
    flags = {flag for key, _, value in lines if key.strip() in ("flags", "Features") for flag in value.split()}
    native = [flag for flag in BF16 if flag in flags]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({', '.join(native) or 'no bf16'})" if text else name


def driver() -> str | None:
    """The version of the NVIDIA driver, or None where nvidia-smi is missing or finds no card."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return None
    return (done.stdout.split() or [None])[0]
