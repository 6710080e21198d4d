"""Files, functions and public names in the documents exist, and links between them have targets."""

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
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
PAGES = sorted(str(p.relative_to(ROOT)) for f in ("", "docs", "kernels") for p in (ROOT / f).glob("*.md"))
CURRENT = [page for page in PAGES if page != "CHANGELOG.md"]  # which names what was removed


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


@pytest.mark.parametrize("page", CURRENT)
def test_every_place_exists(page):
    wrong = missing((ROOT / page).read_text())
    assert not wrong, f"{wrong}: write the new names into {page}"


def test_places_are_found():
    assert len(re.findall(rf"`{FILE}:", PAGE)) > 50


@pytest.mark.parametrize("place", ["fastvae/nowhere.py", "fastvae/tiling.py:nothing", "fastvae/fast/accelerate.py:A.b"])
def test_a_place_that_does_not_exist_is_found(place):
    assert missing(f"see `{place}`")


def test_every_public_name_is_listed():
    listed = TABLE.findall(PAGE[PAGE.index("## Public names") :])
    assert sorted(listed) == sorted(fastvae.__all__)


@cache
def anchors_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    """Return the links of ``text``, as it is in ``page``, whose file or heading does not exist."""
    found = []
    for target, anchor in LINK.findall(text):
        path = (page.parent / target).resolve() if target else page
        if not path.exists() or (anchor and anchor not in anchors_of(path)):
            found.append(f"{target}#{anchor}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_link_has_a_target(page):
    assert not broken_links(ROOT / page, (ROOT / page).read_text())


@pytest.mark.parametrize("link", ["nowhere.md", "latents.md#nothing", "#nothing"])
def test_a_link_without_a_target_is_found(link):
    assert broken_links(ROOT / "docs" / "errors.md", f"[a]({link})")
