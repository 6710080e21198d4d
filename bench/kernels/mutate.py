"""Mutations: small wrong changes to the kernels, one at a time, each of which must turn a test red.

bench/kernels/mutations.toml lists them. The sources and the tests of the ops are copied to a temporary tree; each
change is made there, and the tests that should notice it run in a fresh process under Triton's interpreter. A change
counts as killed when an assertion fails, the process crashes or it runs out of time; one that fails otherwise does not
run at all and proves nothing. Every test is first run on the sources as they are, where it must be green.

    python bench/kernels/mutate.py                     runs all and writes kernels/MUTATIONS.md (make mutate)
    python bench/kernels/mutate.py --only residual     those whose file, function or name holds this; nothing is written
"""

from __future__ import annotations

import argparse
import ast
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

from bench.timing.environment import source_hash

ROOT = Path(__file__).parents[2]
LIST = ROOT / "bench" / "mutations.toml"
TABLE = ROOT / "kernels" / "MUTATIONS.md"
SOURCES, TESTS = Path("kernels", "fastvae_kernels"), Path("tests", "ops")
# What a process needs of the repository.
COPIED = (
    "pyproject.toml",
    "kernels",
    "tests/conftest.py",
    "tests/support/accuracy.py",
    "tests/support/traffic.py",
    "tests/ops",
)
TIMEOUT = 180
# Each process is forked from one that has these, which takes 3 s by itself; none of them imports the kernels.
PRELOADED = ("torch", "torch._dynamo", "triton", "triton.language", "triton.runtime.interpreter", "numpy", "pytest")
CONTEXT = multiprocessing.get_context("forkserver")
COLUMNS = ("mutation", "file", "function", "tests", "killed by", "seconds")


@dataclass(frozen=True)
class Mutation:
    """One wrong change: ``old`` stands exactly once in ``function`` of ``file`` ("module": in all of it)."""

    name: str
    file: str
    function: str
    old: str
    new: str
    tests: tuple[str, ...]
    equivalent: str = ""


@dataclass(frozen=True)
class Outcome:
    """What the tests said of a mutation: ``verdict`` is killed, survived, broken or equivalent; ``by`` says by what."""

    mutation: Mutation
    verdict: str
    by: str
    seconds: float


def read_list(path: Path = LIST) -> list[Mutation]:
    """The mutations of a list, in its order."""
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
    """The names of the functions of a module that triton.jit decorates."""
    return [
        node.name
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]


@functools.cache
def _places(source: str) -> dict[str, tuple[int, int]]:
    # The first line of each function of a module, and the one behind its last.
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {node.name: (node.lineno - 1, node.end_lineno or node.lineno) for node in functions}


def mutated(mutation: Mutation, source: str) -> str:
    """The source with the change made; raises ValueError where the old text does not stand there exactly once."""
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


def _run(tree: Path, tests: list[str], said: Path) -> None:
    # In a process of its own, forked from one that has imported what tests need and nothing of this repository.
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    # A source changed twice in a second and to the same length would meet the bytecode of the first change.
    sys.dont_write_bytecode = True
    # The line that names a failed test is cut off at the width of the terminal; and no test of the ops needs a plugin
    # from elsewhere, which together take half a second to load.
    os.environ |= {"COLUMNS": "1000", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    os.chdir(tree)
    import pytest

    options = ["-q", "-x", "--tb=line", "-rfE", "-p", "no:cacheprovider", "-o", "addopts=", "--import-mode=importlib"]
    status = pytest.main([*options, f"--rootdir={tree}", *(str(TESTS / test) for test in tests)])
    sys.stdout.flush()
    os._exit(int(status))


def run_tests(tree: Path, tests: Iterable[str], timeout: float = TIMEOUT) -> tuple[str, str]:
    """(verdict, by) of these tests in a fresh process: survived where all are green."""
    said = tree / "said.txt"
    process = CONTEXT.Process(target=_run, args=(tree, list(tests), said))
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
    text = said.read_text().replace(f"{tree}/", "")
    failed = re.search(rf"^FAILED (?:{TESTS}/)?(.*?) - (.*)$", text, re.MULTILINE)
    if process.exitcode == 1 and failed and re.match(r"AssertionError|assert |Failed:", failed[2]):
        return "killed", failed[1]
    return "broken", failed[0] if failed else " / ".join(
        re.findall(r"^E .*|^ERROR.*|^/.*", text, re.MULTILINE)[:4]
    ) or text[-300:]


def judge(root: Path, mutations: Iterable[Mutation]) -> Iterator[Outcome]:
    """The outcome of each mutation of the sources under ``root``; raises ValueError where the list is stale."""
    mutations = list(mutations)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            elif (root / name).exists():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / name, tree / name)
        # From the copy alone, in case somebody works on the sources meanwhile.
        sources = {m.file: (tree / SOURCES / m.file).read_text() for m in mutations}
        changed = {m: mutated(m, sources[m.file]) for m in mutations}
        verdict, by = run_tests(tree, dict.fromkeys(test for m in mutations for test in m.tests), 5 * TIMEOUT)
        if verdict != "survived":
            raise ValueError(f"the tests are not green on the sources as they are: {by}")
        for mutation in mutations:
            begin = time.perf_counter()
            place = tree / SOURCES / mutation.file
            place.write_text(changed[mutation])
            verdict, by = run_tests(tree, mutation.tests)
            place.write_text(sources[mutation.file])
            if mutation.equivalent:
                # What is called no change and yet turns a test red is none of that kind.
                verdict = "equivalent" if verdict == "survived" else "broken"
                by = by or mutation.equivalent
            yield Outcome(mutation, verdict, by, time.perf_counter() - begin)


def table(outcomes: list[Outcome], sources: str) -> str:
    """The outcomes as the text of MUTATIONS.md; ``sources``: the hash of what was mutated."""
    rows = [
        (
            outcome.mutation.name,
            outcome.mutation.file,
            outcome.mutation.function,
            ", ".join(test.replace("::", " ") for test in outcome.mutation.tests),
            {"killed": outcome.by, "equivalent": f"equivalent: {outcome.by}"}.get(outcome.verdict, outcome.verdict),
            f"{outcome.seconds:.1f}",
        )
        for outcome in outcomes
    ]
    lines = [
        "# Mutations",
        "",
        "Written by `make mutate`: small wrong changes to the kernels (mutations.toml), one at a time, each in a",
        "fresh process under Triton's interpreter; the tests named must notice it. The hash covers the kernel sources",
        "and the tile tables.",
        "",
        f"{summary(outcomes)}; sources: `{sources}`",
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + "---|" * len(COLUMNS),
        *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def summary(outcomes: list[Outcome]) -> str:
    """How many mutations ended how."""
    verdicts = [outcome.verdict for outcome in outcomes]
    parts = [f"{len(outcomes)} mutations"]
    parts += [f"{verdicts.count(v)} {v}" for v in ("killed", "survived", "broken", "equivalent") if v in verdicts]
    return ", ".join(parts)


def main(arguments: list[str] | None = None, root: Path = ROOT, listed: Path = LIST) -> int:
    """0 where every mutation was killed or is equivalent, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="those whose file, function or name holds this; nothing is written")
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
        (root / TABLE.relative_to(ROOT)).write_text(table(outcomes, sources))
    print(summary(outcomes))
    return int(any(outcome.verdict in ("survived", "broken") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
