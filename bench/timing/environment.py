"""What a result must carry to be worth anything later: commit, sources, versions, device, driver."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "kernels" / "fastvae_kernels"
VERSIONS = ("torch", "triton", "pytest-benchmark", "diffusers", "onnxruntime", "openvino", "onnx", "numpy")


def _command(*words: str) -> str:
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def surroundings() -> dict[str, Any]:
    """The facts of this tree and this machine, as they stand in a results file."""
    from fastvae.report.machine import processor

    versions = {name: _version(name) for name in VERSIONS}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    # "-dirty" where files differ from the commit.
    described = _command("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    found: dict[str, Any] = {
        "commit": os.environ.get("COMMIT") or described,
        "kernel_sources": source_hash(),
        "versions": versions,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "threads": torch.get_num_threads(),
        "processor": processor(),
    }
    if not torch.cuda.is_available():
        return found | {"device": "cpu", "driver": None}
    properties = torch.cuda.get_device_properties(0)
    return found | {
        "device": properties.name,
        "architecture": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "memory_bytes": properties.total_memory,
        "driver": _command("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }


def source_hash() -> str:
    """The hash of every kernel source and tile table, which AUDIT.md carries."""
    digest = hashlib.sha256()
    for path in sorted([*SOURCES.glob("*.py"), *(SOURCES / "tuned").glob("*.json")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
