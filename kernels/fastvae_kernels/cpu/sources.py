"""Names, flags and hash of the C files: setup.py builds by them, and library refuses a build of other files."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("group_norm.c", "winograd.c")
HEADERS = ("vectors.h",)
X86 = ("x86_64", "AMD64")


def source_hash() -> str:
    """Return a hash of the C files, which the library carries."""
    return hashlib.sha256(b"\0".join((FOLDER / name).read_bytes() for name in (*NAMES, *HEADERS))).hexdigest()[:16]


def compile_flags() -> list[str]:
    """Return the compiler's flags for this machine. IEEE arithmetic holds, except that a * b + c may be fused."""
    machine = ["-mavx2", "-mfma", "-mf16c"] if platform.machine() in X86 else []
    return ["-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", *machine, *definition()]


def definition() -> list[str]:
    """Return the flag that compiles the hash into the library."""
    return [f'-DFASTVAE_SOURCES="{source_hash()}"']
