"""File patterns: braces as a shell and WebDataset write them, and globs in which ``**`` crosses folders."""

from __future__ import annotations

import itertools
import math
import re

MOST_NAMES = 1_000_000
MAGIC = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})", re.ASCII)
TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def is_pattern(text: str) -> bool:
    """Whether ``text`` holds a character that a pattern gives a meaning to."""
    return MAGIC.search(text) is not None


def fixed_folder(pattern: str) -> str:
    """The folder before the first part of ``pattern`` that could match several names; "" where there is none."""
    first = MAGIC.search(pattern)
    head, slash, _ = (pattern[: first.start()] if first else pattern).rpartition("/")
    return head or slash


def expand_braces(text: str) -> list[str]:
    """``text`` with each ``{000..012}`` and ``{a,b}`` written out, in order; other braces stay as they are.

    Raises ValueError for a range that runs backwards and for more than MOST_NAMES names.
    """
    parts = BRACES.split(text)  # every second one is the inside of a pair of braces
    choices = [[part] if index % 2 == 0 else _choices(part, text) for index, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MOST_NAMES:
        raise ValueError(f"src must stand for at most {MOST_NAMES} names, {text!r} has more")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, text: str) -> list[str]:
    span = RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = int(span[1]), int(span[2])
    if last < first or last - first >= MOST_NAMES:
        raise ValueError(f"src must count up, over at most {MOST_NAMES} names, got {{{inside}}} in {text!r}")
    width = len(span[1])
    return [str(number).zfill(width) for number in range(first, last + 1)]


def translate(pattern: str) -> re.Pattern[str]:
    """The relative paths that ``pattern`` matches whole: ``*`` and ``?`` stay inside a folder, ``**/`` crosses them."""
    written = ""
    for token in TOKENS.findall(pattern):
        if token == "**/":
            written += "(?:[^/]+/)*"
        elif token == "**":
            written += ".*"
        elif token == "*":
            written += "[^/]*"
        elif token == "?":
            written += "[^/]"
        elif len(token) > 1:
            negated = token[1] == "!"
            inside = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            written += f"[{'^/' if negated else ''}{inside}]"
        else:
            written += re.escape(token)
    return re.compile(written, re.DOTALL)
