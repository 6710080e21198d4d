"""Mutations: small wrong changes to the kernels, one at a time, each of which must make a test fail.

bench/kernels/mutations.toml lists them. The sources and the tests of the ops are copied to a temporary tree. Each
change is made there, and the tests that must notice it run in a fresh process under Triton's interpreter, without those
marked slow. A change counts as killed when an assertion fails, the process crashes or it runs out of time; any other
failure proves nothing. Every test first runs on the unchanged sources, where it must pass.

    python -m bench.kernels.mutate                     runs all; writes kernels/MUTATIONS.md and a row for each mutation
                                                       to bench/results/mutations.csv (make mutate)
    python -m bench.kernels.mutate --only residual     only those whose file, function or name contains this; writes
                                                       nothing
"""

from __future__ import annotations

import argparse
import ast
import csv
import functools
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.timing.environment import ROOT, source_hash

LIST = ROOT / "bench" / "kernels" / "mutations.toml"
SUMMARY = Path("kernels", "MUTATIONS.md")
ROWS = Path("bench", "results", "mutations.csv")
SOURCES, TESTS = Path("kernels", "fastvae_kernels"), Path("tests", "ops")
# The files of the repository that a process needs.
COPIED = (
    "pyproject.toml",
    "kernels",
    "tests/conftest.py",
    "tests/support",
    "tests/ops",
)
TIMEOUT = 180
# Each process is forked from one that has imported these, which takes 3 s; none of them imports the kernels.
PRELOADED = ("torch", "torch._dynamo", "triton", "triton.language", "triton.runtime.interpreter", "numpy", "pytest")
CONTEXT = multiprocessing.get_context("forkserver")
COLUMNS = ("mutation", "file", "function", "tests", "verdict", "by", "seconds")
VERDICTS = ("killed", "survived", "broken", "equivalent")


@dataclass(frozen=True)
class Mutation:
    """One wrong change: ``old`` occurs exactly once in ``function`` of ``file`` ("module": in the whole file)."""

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result of a mutation: ``verdict`` is killed, survived, broken or equivalent; ``by`` is the test or the reason."""

    mutation: Mutation
    verdict: str
    by: str
    seconds: float


def read_list(path: Path = LIST) -> list[Mutation]:
    """Return the mutations of a list, in its order."""
    return [
        Mutation(
            change["name"],
            file,
            function,
            change["old"],
            change["new"],
            tuple(change.get("tests", entry["tests"])),
            change.get("equivalent", ""),
        )
        for file, functions in tomllib.loads(path.read_text()).items()
        for function, entry in functions.items()
        for change in entry["changes"]
    ]


def kernel_functions(source: str) -> list[str]:
    """Return the names of a module's functions that triton.jit decorates."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]


@functools.cache
def _places(source: str) -> dict[str, tuple[int, int]]:
    # The first line of each function of a module, and the line after its last.
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: (node.lineno - 1, node.end_lineno or node.lineno) for node in functions}


def mutated(mutation: Mutation, source: str) -> str:
    """Return the source with the change made. Raises ValueError unless the old text occurs there exactly once."""
    lines = source.splitlines(keepends=True)
    first, last = 0, len(lines)
    if mutation.function != "module":
        places = _places(source)
        if mutation.function not in places:
            raise ValueError(f"the list is stale: {mutation.file} has no function {mutation.function}")
        first, last = places[mutation.function]
    inside = "".join(lines[first:last])
    found = inside.count(mutation.old)
    if found != 1:
        raise ValueError(
            f"the list is stale: {mutation.name!r} of {mutation.function} in {mutation.file} "
            f"finds its old text {found} times"
        )
    return "".join([*lines[:first], inside.replace(mutation.old, mutation.new), *lines[last:]])


def _run(tree: Path, tests: list[str], output: Path) -> None:
    # In a new process, forked from one that has imported what tests need and nothing of this repository.
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A source changed twice in a second and to the same length would get the bytecode of the first change.
    sys.dont_write_bytecode = True
    # pytest cuts the line of a failed test at the width of the terminal. Plugins take half a second to load, and the
    # tests of the ops need none.
    os.environ |= {"COLUMNS": "1000", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(tree)
    import pytest

    options = ["-q", "-x", "--tb=line", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
    status = pytest.main([*options, "-m", "not slow", f"--rootdir={tree}", *(str(TESTS / test) for test in tests)])
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(tree: Path, tests: Iterable[str], timeout: float = TIMEOUT) -> tuple[str, str]:
    """Run these tests in a fresh process; return (verdict, by), "survived" if all of them pass."""
    output = tree / "output.txt"
    process = CONTEXT.Process(target=_run, args=(tree, list(tests), output))
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
        return "killed", f"running longer than {timeout} s"
    if process.exitcode == 0:
        return "survived", ""
    if process.exitcode < 0:
        return "killed", f"a crash (signal {-process.exitcode})"
    text = output.read_text().replace(f"{tree}/", "")
    failed = re.search(rf"^FAILED (?:{TESTS}/)?(.*?) - (.*)$", text, re.MULTILINE)
    if process.exitcode == 1 and failed and re.match(r"AssertionError|assert |Failed:", failed[2]):
        return "killed", failed[1]
    return "broken", failed[0] if failed else " / ".join(
        re.findall(r"^E .*|^ERROR.*|^/.*", text, re.MULTILINE)[:4]
    ) or text[-300:]


def judge(root: Path, mutations: Iterable[Mutation]) -> Iterator[Outcome]:
    """Yield the outcome of each mutation of the sources under ``root``. Raises ValueError where the list is stale."""
    mutations = list(mutations)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, tree / name)
        # From the copy, since the sources may change during the run.
        sources = {m.file: (tree / SOURCES / m.file).read_text() for m in mutations}
        changed = {m: mutated(m, sources[m.file]) for m in mutations}
        verdict, by = run_tests(tree, dict.fromkeys(test for m in mutations for test in m.tests), 5 * TIMEOUT)
        if verdict != "survived":
            raise ValueError(f"the tests do not pass on the unchanged sources: {by}")
        for mutation in mutations:
            begin = time.perf_counter()
            place = tree / SOURCES / mutation.file
            place.write_text(changed[mutation])
            verdict, by = run_tests(tree, mutation.tests)
            place.write_text(sources[mutation.file])
            if mutation.equivalent:
                # A change that turns a test red is not equivalent, whatever the list says.
                verdict = "equivalent" if verdict == "survived" else "broken"
                by = by or mutation.equivalent
            yield Outcome(mutation, verdict, by, time.perf_counter() - begin)


def rows_of(outcomes: list[Outcome]) -> list[dict[str, str]]:
    """Return the outcomes as rows of mutations.csv."""
    cells = [
        (
            outcome.mutation.name,
            outcome.mutation.file,
            outcome.mutation.function,
            " ".join(outcome.mutation.tests),
            outcome.verdict,
            outcome.by,
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
    ]
    return [dict(zip(COLUMNS, row, strict=True)) for row in cells]


def write_rows(rows: list[dict[str, str]], path: Path = ROOT / ROWS) -> None:
    """Write rows as CSV."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*COLUMNS], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path = ROOT / ROWS) -> list[dict[str, str]]:
    """Return the rows that write_rows wrote."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def summarize(rows: list[dict[str, str]], sources: str) -> str:
    """Return the text of MUTATIONS.md: the rows by file, under the hash of the mutated sources."""
    used = [verdict for verdict in VERDICTS if any(row["verdict"] == verdict for row in rows)]
    lines = []
    for file in dict.fromkeys(row["file"] for row in rows):
        found = [row for row in rows if row["file"] == file]
        counts = [sum(row["verdict"] == verdict for row in found) for verdict in used]
        lines.append(
            f"| `{file}` | {' | '.join(map(str, [len({r['function'] for r in found}), len(found), *counts]))} |"
        )
    equivalent = [row for row in rows if row["verdict"] == "equivalent"]
    reasons = [f"- `{row['function']}` in `{row['file']}`, {row['mutation']}: {row['by']}." for row in equivalent]
    text = [
        "# Mutations",
        "",
        "Written by `make mutate`: small wrong changes to the kernels (bench/kernels/mutations.toml), one at a time,",
        "each in a fresh process under Triton's interpreter. A mutation is killed when an assertion of a test of",
        f"`make test` fails, the process crashes, or it runs longer than {TIMEOUT} s.",
        "`bench/results/mutations.csv` has a row for each, with what killed it. The hash covers the code of the",
        "kernels and the tile tables, without comments and docstrings.",
        "",
        f"{summary([row['verdict'] for row in rows])}; sources: `{sources}`",
        "",
        f"| file | functions | mutations | {' | '.join(used)} |",
        "|" + "---|" * (3 + len(used)),
        *lines,
        *(["", "Equivalent, so no test can fail:", "", *reasons] if reasons else []),
    ]
    return "\n".join(text) + "\n"


def summary(verdicts: list[str]) -> str:
    """Return the number of mutations of each verdict, as one line."""
    parts = [f"{len(verdicts)} mutations"]
    parts += [f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS if verdict in verdicts]
    return ", ".join(parts)


def main(arguments: list[str] | None = None, root: Path = ROOT, listed: Path = LIST) -> int:
    """Return 0 if every mutation was killed or is equivalent, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", default="", help="only mutations whose file, function or name contains this; nothing is written"
    )
    only = parser.parse_args(arguments).only
    mutations = [m for m in read_list(listed) if any(only in text for text in (m.file, m.function, m.name))]
    # Read when torch and when triton are imported.
    os.environ.update(OMP_NUM_THREADS="1", TRITON_INTERPRET="1")
    CONTEXT.set_forkserver_preload(list(PRELOADED))
    outcomes, sources = [], source_hash()
    try:
        for outcome in judge(root, mutations):
            outcomes.append(outcome)
            mutation = outcome.mutation
            print(
                f"{outcome.verdict:10} {outcome.seconds:5.1f} s  {mutation.file} {mutation.function}: {mutation.name}"
            )
            if outcome.verdict != "killed":
                print(f"{'':19}{outcome.by or 'no test noticed: ' + ', '.join(mutation.tests)}", flush=True)
    except ValueError as error:
        print(error)
        return 1
    if not only:
        rows = rows_of(outcomes)
        write_rows(rows, root / ROWS)
        (root / SUMMARY).write_text(summarize(rows, sources))
    print(summary([outcome.verdict for outcome in outcomes]))
    return int(any(outcome.verdict in ("survived", "broken") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
