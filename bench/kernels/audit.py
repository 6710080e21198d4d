"""The compile audit: every kernel at every shipped tile, compiled ahead of time for every target, without a GPU.

It runs under the oldest Triton that the package takes and under the newest, each in processes of its own
(bench/kernels/launches.py), and kernels/AUDIT.md holds both. A version other than the environment's lies in
build/triton-VERSION, where `make audit` installs it.

    python bench/kernels/audit.py                      compiles all and writes kernels/AUDIT.md (make audit)
    python bench/kernels/audit.py --only residual --target sm_90 --triton 3.6.0 --print
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.timing.environment import ROOT, source_hash

TABLE = ROOT / "kernels" / "AUDIT.md"
# The oldest that pyproject.toml takes, which comes with torch 2.11, and the one that constraints.txt pins.
VERSIONS = ("3.6.0", "3.9.0")
# sm_86 takes the tiles of sm_89 and sm_120, which have as much shared memory.
AUDITED = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# What names a compilation, the same under every Triton; and what the compiler made of it.
NAMED = ("kernel", "case", "target", "constants", "warps", "stages")
COLUMNS = (*NAMED, "registers", "spilled bytes", "shared bytes", "matrix instructions", "16-byte loads",
           "16-byte stores", "fast sine", "tf32")  # fmt: skip
BETWEEN = " / "


def compile_under(version: str, only: str, targets: list[str], jobs: int) -> list[dict[str, str]]:
    """The rows of every launch, compiled in fresh processes under this version of Triton."""
    # Read when a kernel is decorated: under the interpreter nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "build" / f"triton-{version}"), *given])
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        command = [sys.executable, str(ROOT / "bench" / "launches.py"), str(rows), "--triton", version]
        command += ["--only", only, "--jobs", str(jobs), *(word for name in targets for word in ("--target", name))]
        if subprocess.run(command, env=environment, check=False).returncode:
            raise SystemExit(f"the audit under Triton {version} failed, as said above")
        return json.loads(rows.read_text())


def merge(rows: list[dict[str, str]], versions: tuple[str, ...]) -> list[dict[str, str]]:
    """One row for each compilation, in the order of the table; "a / b" where the versions of Triton differ.

    Raises ValueError when a compilation lacks a version, or has one twice.
    """
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in NAMED), []).append(row)
    merged = []
    for named, group in groups.items():
        found = {row["triton"]: row for row in group}
        if len(group) != len(versions) or set(found) != set(versions):
            under = sorted(row["triton"] for row in group)
            raise ValueError(f"{' | '.join(named)} was compiled under {under}, not once under each of {versions}")
        cells = {name: [found[version][name] for version in versions] for name in COLUMNS}
        merged.append({name: BETWEEN.join(each if len(set(each)) > 1 else each[:1]) for name, each in cells.items()})
    return sorted(merged, key=lambda r: (r["kernel"], r["case"], AUDITED.index(r["target"]), r["constants"]))


def read_table(path: Path = TABLE) -> tuple[str, list[dict[str, str]]]:
    """(hash, rows) of an AUDIT.md: a row for each compilation under each Triton, which its "triton" names."""
    text = path.read_text()
    found = re.search(r"^Triton (.+); sources: `(\w+)`$", text, flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} states no version of Triton and no hash of its sources")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    rows = []
    for index, version in enumerate(found[1].split(BETWEEN)):
        for line in lines[2:]:
            cells = (each[index] if len(each) > 1 else each[0] for each in (cell.split(BETWEEN) for cell in line))
            rows.append({"triton": version} | dict(zip(COLUMNS, cells, strict=True)))
    return found[2], rows


def write_table(rows: list[dict[str, str]], versions: tuple[str, ...], sources: str, path: Path = TABLE) -> None:
    """Write rows of these versions as the table that read_table reads, under the hash of their sources."""
    lines = [
        "# Compile audit",
        "",
        "Written by `make audit`: every kernel at every shipped tile, compiled ahead of time as its launcher would",
        "launch it. Nothing here was run. The hash covers the kernel sources and the tile tables. Where versions of",
        "Triton differ, a cell holds a value for each, in their order.",
        "",
        f"Triton {BETWEEN.join(versions)}; sources: `{sources}`",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(row[name] for name in COLUMNS) + " |" for row in merge(rows, versions)),
    ]
    path.write_text("\n".join(lines) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="modules whose name holds this; the table is printed, not written")
    parser.add_argument("--target", action="append", choices=AUDITED, help="only this target (may be repeated)")
    parser.add_argument("--triton", action="append", choices=VERSIONS, help="only this version (may be repeated)")
    parser.add_argument("--print", action="store_true", help="print the table, write no file")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args()
    versions = tuple(version for version in VERSIONS if version in (arguments.triton or VERSIONS))
    # Taken first: sources that change under the audit leave a table that the tests refuse.
    sources = source_hash()
    rows = []
    for version in versions:
        rows += compile_under(version, arguments.only, arguments.target or [], arguments.jobs)
    if arguments.print or arguments.only or arguments.target or arguments.triton:
        for row in merge(rows, versions):
            print(" | ".join(row[name] for name in COLUMNS))
    else:
        write_table(rows, versions, sources)
        print(f"{len(rows)} compilations; {TABLE.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
