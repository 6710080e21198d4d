"""Every speed on a page links to a results file, or is called a prediction."""

import re
from pathlib import Path

import pytest

from bench.pages import tables

ROOT = Path(__file__).parents[3]

PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
NUMBER = r"\d(?:[\d.,]*\d)?"
RATE = r"(?:images|pictures|img|rows|MB|GB|TB|T?FLOPs?)(?:/s| (?:a|per) second)"
MORE = r"(?:faster|slower|ahead|behind)"
SPEED = re.compile(
    rf"{NUMBER} ?(?:ms|µs|milliseconds|microseconds|{RATE}|TFLOPS)\b"
    rf"|{NUMBER} ?(?:x|\u00d7|times)(?: as fast| faster| slower| the speed)"
    rf"|{NUMBER} ?%[^.]{{0,40}}{MORE}|{MORE}[^.]{{0,40}} {NUMBER} ?%"
)
PREDICTED = re.compile(r"\b(?:predicted|prediction|assumed|guess(?:es)?)\b", re.IGNORECASE)
RESULT = re.compile(r"\]\((?P<link>[^)\s]*bench/results/[^)\s]+\.json)\)")
COUNTED = re.compile(r"<!-- roofline -->.*?<!-- end -->", re.DOTALL)  # tests/fast/test_budget.py checks it


def loose(text, folder):
    """Return the paragraphs outside of results with a speed that neither link a result nor call it a prediction."""
    found, heading = [], ""
    for block in re.split(r"\n\s*\n", COUNTED.sub("", tables.SECTION.sub("", text))):
        heading = block if block.startswith("#") else heading
        said = " ".join(block.split())
        named = any((folder / link["link"]).is_file() for link in RESULT.finditer(said))
        if SPEED.search(said) and not named and not PREDICTED.search(f"{heading} {said}"):
            found.append(said)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_every_speed_on_a_page_has_a_source(page):
    found = loose((ROOT / page).read_text(), (ROOT / page).parent)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "claim",
    [
        "An encode takes 19.3 ms.", "It does 1,674 images/s there.", "2.5x faster than eager.",
        "About 3 times as fast.", "It reaches 790 TFLOP/s.", "It is 3 × faster.",  # noqa: RUF001  as people write it
        "Copies run at 4.1 TB/s.", "It is ahead of the others\nby 7 %.", "That is 12 % slower.", "400 images a second.",
        "See [the results](bench/results/nowhere/results.json): 12 ms.",
        "## Predicted\n\nFine.\n\n## Measured\n\nIt takes 3 ms.",
    ],
)  # fmt: skip
def test_a_claim_without_a_source_is_found(claim):
    assert loose(claim, ROOT)


@pytest.mark.parametrize(
    "claim",
    [
        "An encode is predicted to take 19.3 ms.", "## Predicted, for a card\n\nIt takes 19.3 ms.",
        "See [the results](bench/results/cpu/results.json): 12 ms.",
        "<!-- results: bench/results/cpu/results.json ops -->\nIt takes 3 ms.\n<!-- end -->\n",
        "It moves 37 % of the bytes, at 8 images of 512², in 101 launches.",
    ],
)  # fmt: skip
def test_a_claim_with_a_source_passes(claim):
    assert not loose(claim, ROOT)
