"""Every failure mode has a row in docs/reliability.md, and every row has tests."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reliability.md"
# Failure modes of a GPU: nothing on a CPU can show them.
ON_A_GPU = {18, 20}
LAST = 36


def rows() -> dict[int, str]:
    found = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE.read_text(), re.MULTILINE)
    assert len(found) == len({number for number, _ in found})
    return {int(number): text for number, text in found}


def numbers_tested() -> set[int]:
    return {
        int(number)
        for path in (ROOT / "tests").rglob("test_*.py")
        for number in re.findall(r"^def test_row_(\d\d)_", path.read_text(), re.MULTILINE)
    }


def test_every_failure_mode_has_a_row_and_every_row_a_test():
    assert set(rows()) == set(range(1, LAST + 1))
    assert numbers_tested() == set(range(1, LAST + 1)) - ON_A_GPU


def test_a_row_without_a_figure_gives_the_reason():
    for number, text in rows().items():
        assert re.search(r"\d|not |GPU", text.split("|")[-1]), number


def test_rows_that_security_names_exist():
    named = {int(number) for number in re.findall(r"row_(\d\d)", (ROOT / "SECURITY.md").read_text())}
    assert named
    assert named <= numbers_tested()
