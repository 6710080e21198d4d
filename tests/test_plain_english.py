"""Plain English in code and docs: docstrings begin with a verb or a noun, and worn phrases have a plain form."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SUFFIXES = (".py", ".md", ".sh", ".jinja", ".toml")
NAMES = ("Makefile", "run")
OPENING = re.compile(r"(What|Whether|Who|Whose|How|Which|Where|When|Why)\b")
# Phrase -> the plain form.
PHRASES = {
    r"h[au]ngs? on\b": '"depends on"',
    r"\bin words\b": '"with a message", or nothing',
    r"\bas (?:it|they) stands?\b": '"unchanged", or the name of the state',
    r"\blet go\b": '"released" or "freed"',
    r"\bon (?:its|their) own feet\b": '"standalone" or "without ..."',
    r"\bdoors?\b": '"integrations", or the name of the thing',
    r"\btold (?:apart|by)\b": '"distinguished by"',
    r"\bin the place of\b": '"instead of"',
    r"\bstands? in for\b": '"replaces" or "is used instead of"',
    r"\bnobody's\b": 'the subject that is meant, or "no"',
    r"\bdies? of\b": '"fails with"',
    r"\bis guilty\b": '"is the cause"',
}
CODE = re.compile("`[^`]*`")  # names in Markdown, such as that of a former target
PHRASE = re.compile("|".join(PHRASES), re.IGNORECASE)


def findings(name: str, text: str) -> list[str]:
    """Every opening and phrase of a file that has a plain form: file, line, words and plain form."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        prose = CODE.sub("", line) if name.endswith(".md") else line
        for match in PHRASE.finditer(prose):
            plain = next(plain for phrase, plain in PHRASES.items() if re.fullmatch(phrase, match[0], re.IGNORECASE))
            found.append(f'{name}:{number}: "{match[0]}": write {plain}')
    if name.endswith(".py"):
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                opening = OPENING.match(ast.get_docstring(node) or "")
                if opening:
                    line = node.body[0].lineno
                    found.append(f'{name}:{line}: docstring begins with "{opening[0]}": begin with a verb or a noun')
    return found


def test_code_and_docs_are_plain():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    found = []
    for name in listed:
        path = ROOT / name
        if path == Path(__file__) or not (path.suffix in SUFFIXES or path.name in NAMES) or not path.is_file():
            continue
        found += findings(name, path.read_text())
    assert not found, "\n".join([f"{len(found)} findings", *found])


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.py", '"""Whether it is."""\n', ['a.py:1: docstring begins with "Whether": begin with a verb or a noun']),
        (
            "a.py",
            'def f():\n    """How it is."""\n',
            ['a.py:2: docstring begins with "How": begin with a verb or a noun'],
        ),
        ("a.md", "One.\nIt hangs on two.\n", ['a.md:2: "hangs on": write "depends on"']),
        ("a.md", "Runs In Words.\n", ['a.md:1: "In Words": write "with a message", or nothing']),
        ("a.py", '"""Return what it is."""\nindoors = ""\n', []),
        ("a.md", "What it is, `make test-doors`.\n", []),
    ],
)
def test_a_finding_names_line_and_plain_form(name, text, found):
    assert findings(name, text) == found
