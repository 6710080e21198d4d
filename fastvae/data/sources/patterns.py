"""File patterns: brace expansion as in a shell and in WebDataset, and globs in which ``**`` crosses folders."""

from __future__ import annotations

import itertools
import math
import re

MAX_NAMES = 1_000_000
MAGIC = re.compile(r"[*?\[{]")
BRACES = re.compile(r"\{([^{}]*)\}")
RANGE = re.compile(r"(\d{1,18})\.\.(\d{1,18})", re.ASCII)
TOKENS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^\]]*\]|.", re.DOTALL)


def is_pattern(text: str) -> bool:
    """Return True if ``text`` contains a character with a meaning in patterns."""
    return MAGIC.search(text) is not None


def fixed_folder(pattern: str) -> str:
    """Return the folder before the first part of ``pattern`` that can match several names; "" if there is none."""
    first = MAGIC.search(pattern)
    head, slash, _ = (pattern[: first.start()] if first else pattern).rpartition("/")
    return head or slash


def expand_braces(text: str) -> list[str]:
    """Return the expansions of each ``{000..012}`` and ``{a,b}`` in ``text``, in order; other braces are kept.

    Raises ValueError for a range that runs backwards and for more than MAX_NAMES names.
    """
    parts = BRACES.split(text)  # every second part was inside braces
    choices = [[part] if index % 2 == 0 else _choices(part, text) for index, part in enumerate(parts)]
    if math.prod(map(len, choices)) > MAX_NAMES:
        raise ValueError(f"src must stand for at most {MAX_NAMES} names, {text!r} has more")
    return ["".join(chosen) for chosen in itertools.product(*choices)]


def _choices(inside: str, text: str) -> list[str]:
    span = RANGE.fullmatch(inside)
    if span is None:
        return inside.split(",") if "," in inside else ["{" + inside + "}"]
    first, last = int(span[1]), int(span[2])
    if last < first or last - first >= MAX_NAMES:
        raise ValueError(f"src must count up, over at most {MAX_NAMES} names, got {{{inside}}} in {text!r}")
    width = len(span[1])
    return [str(number).zfill(width) for number in range(first, last + 1)]


def translate(pattern: str) -> re.Pattern[str]:
    """Return the regex of ``pattern`` for whole relative paths: ``*`` and ``?`` match no slash, ``**`` any text."""
    regex = ""
    for token in TOKENS.findall(pattern):
        if token == "**/":
            regex += "(?:[^/]+/)*"
        elif token == "**":
            regex += ".*"
        elif token == "*":
            regex += "[^/]*"
        elif token == "?":
            regex += "[^/]"
        elif len(token) > 1:
            negated = token[1] == "!"
            inside = token[2 if negated else 1 : -1].replace("\\", r"\\").replace("[", r"\[").replace("^", r"\^")
            regex += f"[{'^/' if negated else ''}{inside}]"
        else:
            regex += re.escape(token)
    return re.compile(regex, re.DOTALL)
