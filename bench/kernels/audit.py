"""The compile audit: every kernel at every shipped tile, compiled ahead of time for every target, without a GPU.

It runs under the oldest Triton that the package takes and under the newest, each in its own processes
(bench/kernels/launches.py). bench/results/audit.csv has a row for each kernel, case and target, kernels/AUDIT.md the
summary. A version other than the environment's is in build/triton-VERSION, where `make audit` installs it.

    python -m bench.kernels.audit                      compiles all and writes both files (make audit)
    python -m bench.kernels.audit --only residual --target sm_90 --triton 3.6.0 --print
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.timing.environment import ROOT, source_hash

SUMMARY = ROOT / "kernels" / "AUDIT.md"
ROWS = ROOT / "bench" / "results" / "audit.csv"
# The oldest that pyproject.toml takes, which comes with torch 2.11, and the one that constraints.txt pins.
VERSIONS = ("3.6.0", "3.9.0")
# sm_86 takes the tiles of sm_89 and sm_120, which have as much shared memory.
AUDITED = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# The columns that name a compilation, the same under every Triton; the others are the compiler's results.
NAMED = ("kernel", "case", "target", "constants", "warps", "stages")
COLUMNS = (*NAMED, "registers", "spilled bytes", "shared bytes", "matrix instructions", "16-byte loads",
           "16-byte stores", "fast sine", "tf32")  # fmt: skip
BETWEEN = " / "


def compile_under(version: str, only: str, targets: list[str], jobs: int) -> list[dict[str, str]]:
    """Compile every launch in fresh processes under this version of Triton; return their rows."""
    # Read when a kernel is decorated: under the interpreter nothing compiles.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    given = [environment["PYTHONPATH"]] if environment.get("PYTHONPATH") else []
    folders = [ROOT / "build" / f"triton-{version}", ROOT / "kernels"]
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *given])
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder, "rows.json")
        command = [sys.executable, "-m", "bench.kernels.launches", str(rows), "--triton", version]
        command += ["--only", only, "--jobs", str(jobs), *(word for name in targets for word in ("--target", name))]
        if subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
            raise SystemExit(f"the audit under Triton {version} failed: see the error above")
        return json.loads(rows.read_text())


def merge(rows: list[dict[str, str]], versions: tuple[str, ...]) -> list[dict[str, str]]:
    """Return one row for each kernel, case and target, sorted; "a / b" where the versions of Triton differ.

    Raises ValueError when a compilation lacks a version or has one twice.
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
        cells = {name: [found[version][name] for version in versions] for name in ("triton", *COLUMNS)}
        merged.append({name: BETWEEN.join(each if len(set(each)) > 1 else each[:1]) for name, each in cells.items()})
    return sorted(merged, key=lambda r: (r["kernel"], r["case"], AUDITED.index(r["target"]), r["constants"]))


def read_rows(path: Path = ROWS) -> list[dict[str, str]]:
    """Return the rows that write_rows wrote: one for each compilation under each Triton."""
    with path.open(newline="") as file:
        merged = list(csv.DictReader(file))
    rows = []
    for line in merged:
        for index, _ in enumerate(line["triton"].split(BETWEEN)):
            cells = {name: cell.split(BETWEEN) for name, cell in line.items()}
            rows.append({name: each[index] if len(each) > 1 else each[0] for name, each in cells.items()})
    return rows


def write_rows(rows: list[dict[str, str]], versions: tuple[str, ...], path: Path = ROWS) -> None:
    """Write the rows of these versions as CSV, one line for each kernel, case and target."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["triton", *COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(merge(rows, versions))


def audited_sources(path: Path = SUMMARY) -> str:
    """Return the hash of the sources that an AUDIT.md was compiled from. Raises ValueError when it has none."""
    found = re.search(r"^Sources: `(\w+)`", path.read_text(), flags=re.MULTILINE)
    if found is None:
        raise ValueError(f"{path} has no hash of its sources")
    return found[1]


def summarize(rows: list[dict[str, str]], sources: str) -> str:
    """Return the text of AUDIT.md: the rows by target and Triton, and by kernel, under the hash of their sources."""
    from fastvae_kernels.shared.tiles import TARGETS

    targets, kernels = [], []
    for target in AUDITED:
        for version in sorted({row["triton"] for row in rows}):
            found = [row for row in rows if (row["target"], row["triton"]) == (target, version)]
            limit = TARGETS[target].shared_memory
            if found:
                targets.append((target, version, *_figures(found), limit, _matrix(found), _count(found, "tf32")))
    for kernel in sorted({row["kernel"] for row in rows}):
        found = [row for row in rows if row["kernel"] == kernel]
        hopper = _matrix([row for row in found if row["target"] == "sm_90"])
        kernels.append((f"`{kernel}`", *_figures(found), hopper, _count(found, "fast sine")))
    figures = ("compilations", "most registers", "spilled bytes", "most shared bytes")
    lines = [
        "# Compile audit",
        "",
        "Written by `make audit`: every kernel at every shipped tile, compiled ahead of time as its launcher launches",
        "it. Nothing was run. `bench/results/audit.csv` has a row for each kernel, case and target; a cell is `a / b`",
        "where the two versions of Triton differ. The hash covers the code of the kernels and the tile tables, without",
        "comments and docstrings.",
        "",
        f"Sources: `{sources}`",
        "",
        *_table(("target", "Triton", *figures, "shared bytes available", "matrix instructions", "tf32"), targets),
        "",
        "`tf32` counts compilations whose products round fp32 to tf32. sm_90 has one case more: in its own tile table",
        "the tiles of scores have 128 keys up to 256 channels and 256 keys above, so `_combine_kernel` is compiled for",
        "both. sm_86 is not compiled: it takes the tiles of sm_89.",
        "",
        "The kernels over all targets and versions; `fast sine` counts compilations with the GPU's approximate sine:",
        "",
        *_table(("kernel", *figures, "matrix instructions on sm_90", "fast sine"), kernels),
    ]
    return "\n".join(lines) + "\n"


def _figures(rows: list[dict[str, str]]) -> tuple[int, ...]:
    most = [max(int(row[name]) for row in rows) for name in ("registers", "shared bytes")]
    return len(rows), most[0], sum(int(row["spilled bytes"]) for row in rows), most[1]


def _matrix(rows: list[dict[str, str]]) -> str:
    return ", ".join(sorted({name for row in rows for name in row["matrix instructions"].split()} - {"-"})) or "-"


def _count(rows: list[dict[str, str]], column: str) -> int:
    return sum(row[column] == "True" for row in rows)


def _table(columns: tuple[str, ...], rows: list[tuple]) -> list[str]:
    rule = "|" + "---|" * len(columns)
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(map(str, row))} |" for row in rows)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="modules whose name contains this; the rows are printed, not written"
    )
    parser.add_argument("--target", action="append", choices=AUDITED, help="only this target (may be repeated)")
    parser.add_argument("--triton", action="append", choices=VERSIONS, help="only this version (may be repeated)")
    parser.add_argument("--print", action="store_true", help="print the rows, write no file")
    parser.add_argument("--jobs", type=int, default=2, help="processes that compile")
    arguments = parser.parse_args()
    versions = tuple(version for version in VERSIONS if version in (arguments.triton or VERSIONS))
    # Read first: the tests refuse a summary whose sources changed during the audit.
    sources = source_hash()
    rows = []
    for version in versions:
        rows += compile_under(version, arguments.only, arguments.target or [], arguments.jobs)
    if arguments.print or arguments.only or arguments.target or arguments.triton:
        for row in merge(rows, versions):
            print(" | ".join(row[name] for name in COLUMNS))
    else:
        write_rows(rows, versions)
        SUMMARY.write_text(summarize(rows, sources))
        print(f"{len(rows)} compilations; {ROWS.relative_to(ROOT)} and {SUMMARY.relative_to(ROOT)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
