"""docs/architecture.md names files, functions and public names that exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

import fastvae

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# Its step lists call a file that is still to be written NAME.py.
FILE = r"((?:fastvae|kernels|bench|tests|examples|docs)/[\w./-]*)"
TABLE = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


@cache
def names_in(path: Path) -> set[str]:
    """Return the names that a module defines at its top, and Class.method for its methods."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
    return names


def missing(text: str) -> list[str]:
    """Return the files and file.py:name of ``text`` that do not exist."""
    found = []
    for place, name in re.findall(rf"`{FILE}(?::([\w.]+))?`", text):
        path = ROOT / place
        if "NAME" in place:
            continue
        if not path.exists() or (name and name not in names_in(path)):
            found.append(f"{place}:{name}")
    return found


def test_every_place_exists():
    assert len(re.findall(rf"`{FILE}:", PAGE)) > 50
    wrong = missing(PAGE)
    assert not wrong, f"{wrong}: write the new names into docs/architecture.md"


@pytest.mark.parametrize("place", ["fastvae/nowhere.py", "fastvae/tiling.py:nothing", "fastvae/fast/accelerate.py:A.b"])
def test_a_place_that_does_not_exist_is_found(place):
    assert missing(f"see `{place}`")


def test_every_public_name_is_listed():
    listed = TABLE.findall(PAGE[PAGE.index("## Public names") :])
    assert sorted(listed) == sorted(fastvae.__all__)
