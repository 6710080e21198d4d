"""The imports of this repository's packages as a graph, and the order that they must keep (docs/architecture.md).

python -m bench.pages.import_graph      prints the sub-packages of fastvae.data and the longest chain of its files
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
Graph = Mapping[str, set[str]]
Order = tuple[tuple[str, ...], ...]
# Packages and modules of fastvae: each may import what is in a later line, and nothing of its own line.
ORDER: Order = (
    ("__main__",),
    ("cli",),
    ("report", "scale"),
    ("data", "training"),
    ("fast",),
    ("models",),
    ("latents",),
    ("checkpoints",),
    ("tiling", "metrics", "system", "_version"),
)
# Sub-packages of fastvae.data, in the same form.
DATA_ORDER: Order = (("exporting", "decoding"), ("datasets", "encoding"), ("store", "sources"), ("images",), ("rows",))


def imports_of(path: Path) -> list[str]:
    """Return the full names of the modules that ``path`` imports, those inside functions included.

    Raises ValueError for a relative import: it hides the package.
    """
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}: write the full name of the module that line {node.lineno} imports")
            # `from fastvae import latents` imports the module fastvae.latents.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Return module -> the modules of this repository that it imports, for fastvae, fastvae_kernels and bench."""
    files = {}
    for base, package in ((ROOT, "fastvae"), (ROOT / "kernels", "fastvae_kernels"), (ROOT, "bench")):
        for path in (base / package).rglob("*.py"):
            files[".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")] = path
    del files["fastvae"]  # the lazy face imports nothing until a name is used
    found = {}
    for module, path in files.items():
        names = {name if name in files else name.rpartition(".")[0] for name in imports_of(path)}
        found[module] = {name for name in names if name in files and name != module}
    return found


def between_members(modules: Graph, package: str) -> dict[str, set[str]]:
    """Return the imports between the direct members of ``package``, by their short names."""

    def member(module: str) -> str | None:
        return module.removeprefix(f"{package}.").split(".")[0] if module.startswith(f"{package}.") else None

    found: dict[str, set[str]] = {name: set() for module in modules if (name := member(module))}
    for module, targets in modules.items():
        if source := member(module):
            found[source] |= {name for target in targets if (name := member(target)) and name != source}
    return found


def circle(modules: Graph) -> list[str]:
    """Return modules that import each other in a circle, the first one twice; empty if there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(modules[module]):
            if found := walk(target, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in sorted(modules) if (found := walk(module, []))), [])


def longest_chain(modules: Graph) -> list[str]:
    """Return the longest list of modules in which each imports the next; ``modules`` has no circle."""

    @cache
    def chain(module: str) -> tuple[str, ...]:
        return (module, *max((chain(target) for target in sorted(modules[module])), key=len, default=()))

    return list(max(map(chain, sorted(modules)), key=len))


def imports_back_up(modules: Graph, order: Order) -> list[str]:
    """Return a line for each import that ``order`` forbids.

    Raises ValueError for a module that is in no line of ``order``.
    """
    rank = {name: number for number, names in enumerate(order) for name in names}
    if unknown := sorted(modules.keys() - rank.keys()):
        raise ValueError(f"{unknown} are in no line of the order in {Path(__file__).relative_to(ROOT)}: add them there")
    return [f"{a} imports {b}" for a, targets in sorted(modules.items()) for b in sorted(targets) if rank[b] <= rank[a]]


def reduced(modules: Graph) -> dict[str, set[str]]:
    """Return ``modules`` without the imports that a longer chain implies; ``modules`` has no circle."""

    @cache
    def reach(module: str) -> frozenset[str]:
        return frozenset().union(*({target} | reach(target) for target in modules[module]))

    return {
        module: {t for t in targets if not any(t in reach(other) for other in targets - {t})}
        for module, targets in modules.items()
    }


def main() -> None:
    data = between_members(graph(), "fastvae.data")
    for name, targets in sorted(data.items()):
        print(f"fastvae.data.{name} imports {', '.join(sorted(targets)) or 'none of its siblings'}")
    print(f"{sum(map(len, data.values()))} arrows, {len(longest_chain(data))} deep: {' -> '.join(longest_chain(data))}")
    files = {a: {b for b in bs if b.startswith("fastvae.data.")} for a, bs in graph().items() if "fastvae.data." in a}
    chain = longest_chain(files)
    print(f"longest chain of its files, {len(chain)}: {' -> '.join(chain)}")


if __name__ == "__main__":
    main()
