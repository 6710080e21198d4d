"""The hash of the kernels' sources: code changes it; comments, docstrings and moves between files do not."""

import ast
import shutil

import pytest

from bench.timing.environment import SOURCES, source_hash


@pytest.fixture
def sources(tmp_path):
    """A copy of the kernels' package."""
    return shutil.copytree(SOURCES, tmp_path / SOURCES.name, ignore=shutil.ignore_patterns("__pycache__"))


def replace(path, old, new):
    text = path.read_text()
    assert text.count(old) == 1, f"{path.name} has {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))


def function_of(path, name):
    return next(n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == name)


def test_comments_docstrings_and_line_breaks_keep_it(sources):
    path = sources / "parts" / "attention_tiles.py"
    docstring = ast.get_docstring(ast.parse(path.read_text()), clean=False)
    replace(path, docstring, "Another text.")
    replace(path, "WORKSPACE = 256 * 2**20", "# A comment.\nWORKSPACE = (\n    256 * 2**20  # bytes\n)")
    replace(path, ast.get_source_segment(path.read_text(), function_of(path, "width_of").body[0]), "# No docstring.")
    assert source_hash(sources) == source_hash()


def test_a_definition_moved_to_another_file_keeps_it(sources):
    before, after = sources / "parts" / "attention_tiles.py", sources / "shared" / "runtime.py"
    moved = ast.get_source_segment(before.read_text(), function_of(before, "width_of"))
    replace(before, moved, "")
    replace(before, "runtime import tl, triton", "runtime import tl, triton, width_of")
    after.write_text("\n".join([after.read_text(), "import math", "", moved]))
    (sources / "parts" / "moments.py").rename(sources / "shared" / "moments.py")
    assert source_hash(sources) == source_hash()


CHANGES = {
    "a constant": ("parts/attention_tiles.py", "WORKSPACE = 256 * 2**20", "WORKSPACE = 128 * 2**20"),
    "a kernel": ("parts/attention_tiles.py", "rows[:, None] * CHANNELS", "rows[:, None] * WIDTH"),
    "an import": ("shared/runtime.py", "import functools", "import functools as math"),
    "another import": ("parts/attention_products.py", "import size_in_bytes", "import Cost as size_in_bytes"),
    "a table of tiles": ("tuned/sm_90.json", '"rows": 128', '"rows": 64'),
}  # fmt: skip


@pytest.mark.parametrize(("file", "old", "new"), CHANGES.values(), ids=CHANGES)
def test_changed_code_changes_it(sources, file, old, new):
    path = sources / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    assert source_hash(sources) != source_hash()
