"""Commit, sources, versions, device and driver of a result."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

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
    """Return the facts of this tree and this machine that a results file records."""
    from fastvae_kernels.cpu import sources

    from fastvae.report.machine import processor

    versions = {name: _version(name) for name in VERSIONS}
    versions |= {"python": platform.python_version(), "cuda": torch.version.cuda}
    # It ends in "-dirty" if files differ from the commit.
    described = _command("git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    found: dict[str, Any] = {
        "commit": os.environ.get("COMMIT") or described,
        "kernel_sources": source_hash(),
        "cpu_sources": sources.source_hash(),
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


def source_hash(sources: Path = SOURCES) -> str:
    """Return the hash of the kernels' code and tile tables, which AUDIT.md carries.

    It covers every statement at the top of a file, whichever file that is, and what the files import. Comments,
    docstrings and moves of definitions between files leave it as it is; a change of code does not.
    """
    digest = hashlib.sha256()
    for line in [*sorted(_statements(sources)), *sorted(_imports(sources))]:
        digest.update(line.encode() + b"\0")
    for path in sorted((sources / "tuned").glob("*.json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


@functools.cache
def _top_level(text: str) -> tuple[tuple[ast.stmt, str], ...]:
    # Cached: the tests hash copies of the sources that differ in one file.
    return tuple((node, _dump(node)) for node in ast.parse(text).body)


def _files(sources: Path) -> dict[str, tuple[tuple[ast.stmt, str], ...]]:
    # The statements of every file, by the name that others import it under.
    # Triton compiles nothing in cpu/.
    paths = (path for path in sources.rglob("*.py") if path.parent != sources / "cpu")
    return {path.stem: _top_level(path.read_text()) for path in paths if path.stem != "__init__"}


def _statements(sources: Path) -> list[str]:
    bodies = _files(sources).values()
    return [dump for body in bodies for node, dump in body if not _is_import(node) and not _is_docstring(node)]


def _imports(sources: Path) -> set[str]:
    # Of the package itself only names that an import changes, or that several files define: others mean the one
    # definition, whichever file it is in.
    files, found = _files(sources), set()
    defined = {stem: {name: dump for node, dump in body for name in _names(node)} for stem, body in files.items()}
    times = Counter(name for names in defined.values() for name in names)
    for node in (node for body in files.values() for node, _ in body if _is_import(node)):
        for alias in node.names:
            module = getattr(node, "module", None) or ""
            if not module.startswith(f"{sources.name}"):
                found.add(f"{module} {alias.name} {alias.asname}")
            elif alias.asname or times[alias.name] > 1:
                found.add(f"{defined.get(module.split('.')[-1], {}).get(alias.name)} {alias.name} {alias.asname}")
    return found


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)]


def _is_import(node: ast.stmt) -> TypeGuard[ast.Import | ast.ImportFrom]:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _is_docstring(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _dump(part: Any) -> str:
    # Not ast.dump: Python 3.13 leaves out empty fields, and the hash is the same under every Python.
    if isinstance(part, list):
        return f"[{', '.join(_dump(each) for each in part if not _is_docstring(each))}]"
    if not isinstance(part, ast.AST):
        return repr(part)
    fields = [f"{name}={_dump(value)}" for name, value in ast.iter_fields(part) if value is not None and value != []]
    return f"{type(part).__name__}({', '.join(fields)})"
