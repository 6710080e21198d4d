"""Names, flags and hash of the C files: setup.py builds by them, and library refuses a build of other files."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = ("group_norm.c", "winograd.c", "avx512.c", "memory.c")
HEADERS = ("vectors.h",)
X86 = ("x86_64", "AMD64")
FLAGS = ("-O3", "-std=gnu11", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast")
X86_FLAGS = ("-mavx2", "-mfma", "-mf16c")


def source_hash() -> str:
    """Return a hash of the C files and of the flags for every machine, which the library carries."""
    files = [(FOLDER / name).read_bytes() for name in (*NAMES, *HEADERS)]
    flags = " ".join((*FLAGS, *X86_FLAGS)).encode()
    return hashlib.sha256(b"\0".join([*files, flags])).hexdigest()[:16]


def compile_flags() -> list[str]:
    """Return the compiler's flags for this machine. IEEE arithmetic holds, except that a * b + c may be fused."""
    return [*FLAGS, *(X86_FLAGS if platform.machine() in X86 else ()), *definition()]


def definition() -> list[str]:
    """Return the flag that compiles the hash into the library."""
    return [f'-DFASTVAE_SOURCES="{source_hash()}"']
