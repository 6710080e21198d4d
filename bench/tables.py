"""The tables of results in README.md and docs/performance.md, written from the results themselves.

    python bench/tables.py          (make report)

Between `<!-- results: FILE TABLE -->` and `<!-- end -->` stands what FILE holds; a test compares the two. TABLE is
pipeline, ops, encoder or decoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/performance.md")
SECTION = re.compile(r"(<!-- results: (?P<file>\S+) (?P<table>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_YET = "Not measured yet."
DTYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def _seconds(value: float) -> str:
    """Milliseconds in three digits or more."""
    return f"{1e3 * value:.{0 if value >= 0.1 else 1 if value >= 0.01 else 3}f}"


def _interval(row: Mapping[str, Any]) -> str:
    return " to ".join(_seconds(end) for end in row["interval"]) if row["interval"] else "too few rounds"


def _times(row: Mapping[str, Any]) -> str:
    return f"{row['times_diffusers']:.2f}" if row["times_diffusers"] else ""


def _why_not(row: Mapping[str, Any]) -> str:
    return f"left out: {row['left_out']}" if "left_out" in row else f"failed: {row['failed']}"


def network_tables(result: Mapping[str, Any], part: str) -> list[str]:
    """For each case of an encoder or decoder: contestant, median, interval, times diffusers, error, share of floor."""
    lines: list[str] = []
    for entry in result.get("networks", {}).values():
        if entry["part"] != part:
            continue
        floor = f"{entry['rounds']} rounds; floor {_seconds(entry['floor_seconds'])} ms"
        shape = f"{entry['batch']} x {entry['side']}², {DTYPES[entry['dtype']]}"
        beside = ", with torch.compile" if entry["compiled"] else ""
        lines += [
            f"**{part}, {entry['preset']}, {shape}{beside}** ({floor})",
            "",
            "| | median, ms | 95 % interval | times diffusers | error | share of the floor | peak memory |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, row in entry["contestants"].items():
            if "median_seconds" not in row:
                lines.append(f"| {name} | {_why_not(row)} | | | | | |")
                continue
            memory = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
            lines.append(
                f"| {name} | {_seconds(row['median_seconds'])} | {_interval(row)} | {_times(row)} "
                f"| {_share(row['error'])} | {100 * row['share_of_floor']:.0f} % | {memory} |"
            )
        lines.append("")
    return lines


def _share(error: float) -> str:
    """An rms error as a share of the result's spread."""
    return f"{100 * error:.2f} %" if error >= 1e-4 else f"{error:.1e}"


def ops_table(result: Mapping[str, Any]) -> list[str]:
    """Each op: median of ours, the roof's share, and eager by layout."""
    if not result.get("cases"):
        return []
    lines = ["| op | ours | median, ms | share of the roof | times eager |", "|---|---|---|---|---|"]
    for name, row in result["cases"].items():
        beside = ", ".join(f"{ratio:.2f} {layout}" for layout, ratio in row["times_eager"].items())
        lines.append(
            f"| {name} | {row['ours']} | {_seconds(row['median_seconds']['ours'])} "
            f"| {100 * row['share_of_roof']:.0f} % | {beside} |"
        )
    return [*lines, ""]


def pipeline_table(result: Mapping[str, Any]) -> list[str]:
    """A folder of photographs to latents on disk: images a second."""
    entry = result.get("pipeline")
    if not entry:
        return []
    lines = [
        "| | images/s | 95 % interval | times diffusers | error of the mean, rms, as a share of its spread |",
        "|---|---|---|---|---|",
    ]
    for name, row in entry["contestants"].items():
        ends = row["interval"] and [entry["images"] / end for end in reversed(row["interval"])]
        between = "too few rounds" if not ends else " to ".join(f"{end:.2f}" for end in ends)
        error = "compared with" if row["error"] is None else f"{100 * row['error']:.2f} %"
        label = "diffusers at its defaults (fp32)" if name == "diffusers" else name
        lines.append(f"| {label} | {row['images_per_second']:.2f} | {between} | {_times(row)} | {error} |")
    return [*lines, "", f"{entry['images']} photographs, medians of {entry['rounds']} rounds."]


def origin(result: Mapping[str, Any]) -> str:
    """Where the numbers come from: device, versions, commit."""
    versions = ", ".join(f"{name} {result['versions'][name]}" for name in VERSIONS if result["versions"].get(name))
    place = result["processor"] if result["device"] == "cpu" else f"{result['device']}, driver {result['driver']}"
    return f"{result['threads']} threads of {place}; {versions}; commit {result['commit'][:12]}, {result['date']}."


VERSIONS = ("torch", "triton", "diffusers", "onnxruntime", "openvino")
TABLES = {
    "pipeline": pipeline_table,
    "ops": ops_table,
    "encoder": lambda result: network_tables(result, "encoder"),
    "decoder": lambda result: network_tables(result, "decoder"),
}


def with_results(text: str, root: Path = ROOT) -> str:
    """``text`` with every section of results written anew; where there is no result yet, it says so.

    Raises ValueError for a result of a dry or failed run, and for a table that is none.
    """

    def written(section: re.Match) -> str:
        if section["table"] not in TABLES:
            raise ValueError(f"TABLE must be one of {', '.join(TABLES)}, got {section['table']!r}")
        lines, path = [], root / section["file"]
        if path.exists():
            result = json.loads(path.read_text())
            if result["dry"]:
                raise ValueError(f"{section['file']} is of a dry run: it has no times")
            lines = TABLES[section["table"]](result)
            lines = [*lines, origin(result)] if lines else []
        return section[1] + "\n".join(lines or [NOT_YET]) + f"\n{section[4]}"

    return SECTION.sub(written, text)


def write(root: Path = ROOT) -> list[str]:
    """Write the tables of every page; the names of those that changed."""
    changed = []
    for name in PAGES:
        text = (root / name).read_text()
        new = with_results(text, root)
        if new != text:
            (root / name).write_text(new)
            changed.append(name)
    return changed


if __name__ == "__main__":
    print("written: " + (", ".join(write()) or "nothing, all tables are as their results"))
