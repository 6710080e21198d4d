"""The bars that a run is held to by its readers, as information: it prints which are held, and fails for none.

    python bench/pages/targets.py [RESULTS]          (the last lines of make bench)

Each is computed twice from the medians of a results file: for `accelerate` alone, and for the fastest of our rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "cpu" / "results.json"
# Our rows begin with the name of the plain one.
OURS, DIFFUSERS = "fastvae", "diffusers"


@dataclass(frozen=True)
class Bar:
    """A ratio of seconds, theirs over ours, that is to be ``least`` or more.

    rival: a contestant, or None for the fastest that is not fastvae; rival_dtype: that of its case, where it is another
    than ours.
    """

    words: str
    dtype: str
    least: float
    rival: str | None = None
    rival_dtype: str | None = None
    part: str = "encoder"


BARS = (
    Bar("bf16: 3 x diffusers in bf16", "bfloat16", 3.0, DIFFUSERS),
    Bar("bf16: 3 x diffusers at its default, fp32", "bfloat16", 3.0, DIFFUSERS, "float32"),
    Bar("bf16: ahead of all, or within 3 %", "bfloat16", 1 / 1.03),
    Bar("fp32: at most 1.35 x the best", "float32", 1 / 1.35),
)


def seconds(result: Mapping[str, Any], part: str, dtype: str) -> dict[str, dict[str, float]]:
    """Case without its dtype -> contestant -> median seconds."""
    found: dict[str, dict[str, float]] = {}
    for entry in result["networks"].values():
        if (entry["part"], entry["dtype"]) == (part, dtype):
            key = f"{entry['part']} {entry['preset']} {entry['batch']} x {entry['side']}²"
            rows = {n: row["median_seconds"] for n, row in entry["contestants"].items() if "median_seconds" in row}
            # The case with torch.compile is one more of the same shape: the fastest of each.
            kept = found.setdefault(key, {})
            kept |= {name: min(taken, kept.get(name, taken)) for name, taken in rows.items()}
    return found


def ratios(result: Mapping[str, Any], bar: Bar) -> dict[str, tuple[float | None, float | None]]:
    """Case -> theirs over ours, for `accelerate` alone and for the fastest of ours; None for what was not measured."""
    told = {}
    theirs_by_case = seconds(result, bar.part, bar.rival_dtype or bar.dtype)
    for case, rows in seconds(result, bar.part, bar.dtype).items():
        rivals = theirs_by_case.get(case, {})
        if bar.rival is None:
            theirs = min((taken for name, taken in rivals.items() if not name.startswith(OURS)), default=None)
        else:
            theirs = rivals.get(bar.rival)
        best = min((taken for name, taken in rows.items() if name.startswith(OURS)), default=None)
        plain = rows.get(OURS)
        told[case] = (theirs and plain and theirs / plain, theirs and best and theirs / best)
    return told


def lines(result: Mapping[str, Any], bars: Sequence[Bar] = BARS) -> list[str]:
    """The table that is printed."""
    head = f"{'bars, for information':42} {'case':26} {'at least':>8}  {'accelerate':16} {'our fastest':16}"
    told = [head]
    for bar in bars:
        for case, pair in ratios(result, bar).items() or {"no such case": (None, None)}.items():
            cells = (f"{_verdict(ratio, bar.least):16}" for ratio in pair)
            told.append(f"{bar.words:42} {case:26} {bar.least:8.3f}  {' '.join(cells)}".rstrip())
    return told


def _verdict(ratio: float | None, least: float) -> str:
    if ratio is None:
        return "not measured"
    return f"{ratio:6.3f} {'held' if ratio >= least else 'missed'}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, default=RESULTS, help="a results file")
    print("\n".join(lines(json.loads(parser.parse_args(arguments).results.read_text()))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
