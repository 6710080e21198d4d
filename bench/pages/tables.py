"""Write the tables and pictures of results into README.md and docs/.

    python -m bench.pages.tables          (make report)

Between `<!-- results: FILE TABLE -->` and `<!-- end -->` is what FILE holds; a test compares them. TABLE is pipeline,
ops, encoder, decoder, profile, networks (encoder and decoder in short), or devices: all but the short one, of every GPU
whose results FILE (with a *) finds. Pictures go to docs/images, named after the results' folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastvae_kernels.cpu import sources

from bench.pages import bar_svg as pictures
from bench.timing import profiles
from bench.timing.environment import source_hash

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/performance.md")
SECTION = re.compile(r"(<!-- results: (?P<file>\S+) (?P<table>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
RESULTS, IMAGES = "bench/results/*/results.json", "docs/images"
NOT_YET, NO_WALL = "Not measured yet.", "not measured"


def _milliseconds(value: float) -> str:
    """Return milliseconds with three digits or more."""
    return f"{1e3 * value:.{0 if value >= 0.1 else 1 if value >= 0.01 else 3}f}"


def _interval(row: Mapping[str, Any]) -> str:
    return " to ".join(_milliseconds(end) for end in row["interval"]) if row["interval"] else "too few rounds"


def _times(row: Mapping[str, Any]) -> str:
    return f"{row['times_diffusers']:.2f}" if row["times_diffusers"] else ""


def _why_not(row: Mapping[str, Any]) -> str:
    return f"left out: {row['left_out']}" if "left_out" in row else f"failed: {row['failed']}"


def _wall(row: Mapping[str, Any]) -> str:
    """Return the wall time of synchronised calls, which results from before it was measured lack."""
    return _milliseconds(row["wall_seconds"]) if "wall_seconds" in row else NO_WALL


def network_tables(result: Mapping[str, Any], part: str) -> list[str]:
    """Return a table for each case of an encoder or decoder: median, interval, ratio, error, share of floor.

    Of a GPU the median is device time, and a column has the wall time of synchronised calls.
    """
    lines: list[str] = []
    on_gpu = result["device"] != "cpu"
    times = ["device time, median, ms", "95 % interval", "wall time, ms"] if on_gpu else ["median, ms", "95 % interval"]
    head = ["", *times, "times diffusers", "error", "share of the floor", "peak memory"]
    for entry in result.get("networks", {}).values():
        if entry["part"] != part:
            continue
        floor = f"{entry['rounds']} rounds; floor {_milliseconds(entry['floor_seconds'])} ms"
        beside = ", with torch.compile" if entry["compiled"] else ""
        lines += [f"**{pictures.title(entry)}{beside}** ({floor})", "", *_head(head)]
        for name, row in entry["contestants"].items():
            if "median_seconds" not in row:
                lines.append(_row([name, _why_not(row), *[""] * (len(head) - 2)]))
                continue
            times = [_milliseconds(row["median_seconds"]), _interval(row), *([_wall(row)] if on_gpu else [])]
            memory = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f} GiB"
            floor = f"{100 * row['share_of_floor']:.0f} %"
            lines.append(_row([name, *times, _times(row), _share(row["error"]), floor, memory]))
        lines.append("")
    return lines


def _row(cells: Sequence[str]) -> str:
    return re.sub(" +", " ", f"| {' | '.join(cells)} |")


def _head(cells: Sequence[str]) -> list[str]:
    return [_row(cells), "|---" * len(cells) + "|"]


def _share(error: float) -> str:
    """Return an rms error, given as a share of the standard deviation, as text."""
    return f"{100 * error:.2f} %" if error >= 1e-4 else f"{error:.1e}"


def ops_table(result: Mapping[str, Any]) -> list[str]:
    """Return a row for each op: median of ours, share of the roof, and ratios to eager by layout."""
    if not result.get("cases"):
        return []
    on_gpu = result["device"] != "cpu"
    times = ["device time, median, ms", "Python's time, ms"] if on_gpu else ["median, ms"]
    lines = _head(["op", "ours", *times, "share of the roof", "times eager"])
    for name, row in result["cases"].items():
        beside = ", ".join(f"{ratio:.2f} {layout}" for layout, ratio in row["times_eager"].items())
        taken = [row["median_seconds"]["ours"], *([row["host_seconds"]] if on_gpu else [])]
        share = f"{100 * row['share_of_roof']:.0f} %"
        lines.append(_row([name, row["ours"], *map(_milliseconds, taken), share, beside]))
    return [*lines, ""]


def pipeline_table(result: Mapping[str, Any]) -> list[str]:
    """Return the table of photographs to latents on disk, in images a second."""
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


def profile_table(result: Mapping[str, Any]) -> list[str]:
    """Return a table for each profile: a row for each group of operators or kernels, a column for each contestant."""
    lines: list[str] = []
    for entry in result.get("profiles", {}).values():
        columns = profiles.shown(entry["contestants"])
        totals = {name: sum(groups.values()) for name, groups in columns.items()}
        lines += [
            f"**{pictures.title(entry)}** (ms in {entry['counted']}; of {entry['calls']} calls the middle one)",
            "",
            f"| | {' | '.join(columns)} |",
            "|---" * (1 + len(columns)) + "|",
        ]
        for group in next(iter(columns.values())):
            cells = (
                f"{_milliseconds(seconds[group])} ({100 * seconds[group] / totals[name]:.0f} %)"
                for name, seconds in columns.items()
            )
            lines.append(f"| {group} | {' | '.join(cells)} |")
        lines += [f"| together | {' | '.join(map(_milliseconds, totals.values()))} |", ""]
    return lines


def networks_table(result: Mapping[str, Any]) -> list[str]:
    """Return the short table of README: a row for each bf16 case, milliseconds and ratio to diffusers."""
    lines = []
    for entry in result.get("networks", {}).values():
        rows = [entry["contestants"].get(name, {}) for name in SHOWN_IN_SHORT]
        if entry["dtype"] != "bfloat16" or any("median_seconds" not in row for row in rows):
            continue
        ours = [text for row in rows[1:] for text in (_milliseconds(row["median_seconds"]), _times(row))]
        walls = list(map(_wall, rows))
        wall = NO_WALL if NO_WALL in walls else " / ".join(walls)
        work = f"{WORK[entry['part']]} {entry['batch']} x {entry['side']}²"
        lines.append(_row([work, _milliseconds(rows[0]["median_seconds"]), *ours, wall]))
    if not lines:
        return []
    ours = [text for name in SHOWN_IN_SHORT[1:] for text in (f"{name}, ms", "times diffusers")]
    return [*_head(["images, in bf16", f"{SHOWN_IN_SHORT[0]}, ms", *ours, "wall time of the three, ms"]), *lines, ""]


def networks_origin(result: Mapping[str, Any]) -> str:
    """Return the origin of a short table: the machine, then the commits of the encoder's and of the decoder's cases."""
    machines = {part: _machine(_facts(result, part)) for part in WORK}
    if len(set(machines.values())) > 1:
        return " ".join(f"{name.capitalize()}: {origin(result, part)}" for part, name in WORK.items())
    commits = " ".join(f"{name.capitalize()}: {_run(result, part)}" for part, name in WORK.items())
    return f"{machines['encoder']}. {commits}"


def origin(result: Mapping[str, Any], table: str) -> str:
    """Return device, versions and commit of a result; those of the part if parts were run separately."""
    return f"{_machine(_facts(result, table))}; {_run(result, table)}"


def _facts(result: Mapping[str, Any], table: str) -> Mapping[str, Any]:
    return {**result, **result.get("parts", {}).get(table, {})}


def _machine(facts: Mapping[str, Any]) -> str:
    """Return device and versions."""
    versions = ", ".join(f"{name} {facts['versions'][name]}" for name in VERSIONS if facts["versions"].get(name))
    if facts["device"] == "cpu":
        return f"{facts['threads']} threads of {facts['processor']}; {versions}"
    return f"{facts['device']}, driver {facts['driver']}; {versions}"


def _run(result: Mapping[str, Any], table: str) -> str:
    """Return commit and date, kernel sources that differ from today's, and how a part ended that did not pass."""
    facts = _facts(result, table)
    commit, dirty, _ = facts["commit"].partition("-dirty")
    changed = " with uncommitted changes" if dirty else ""
    # On a CPU the ops run the references in the GPU kernels' files, and everything else the C kernels.
    if facts["device"] != "cpu" or table == "ops":
        same = facts["kernel_sources"] == source_hash()
    else:
        same = facts.get("cpu_sources") == sources.source_hash()
    earlier = "" if same else ", measured with earlier kernel sources"
    return f"commit {commit[:12]}{changed}, {facts['date']}{earlier}.{_ending(result, table)}"


def _ending(result: Mapping[str, Any], table: str) -> str:
    part = result.get("parts", {}).get(table)
    if not part or part["passed"]:
        return ""
    limit = re.fullmatch(r"stopped after (\d+ s)", part["status"])
    if limit and table in WORK and not part["failed"] and _complete(result, table):
        return f" The time limit of {limit[1]} ended this part; each row with a time is complete and passed its check."
    return f" This part did not pass: {part['status']}."


def _complete(result: Mapping[str, Any], part: str) -> bool:
    """Return True if each timed row of a part has every round; its error is recorded only after the check."""
    entries = [entry for entry in result["networks"].values() if entry["part"] == part]
    rows = [(row, entry["rounds"]) for entry in entries for row in entry["contestants"].values()]
    return all(
        "error" in row and len(row.get("seconds", [])) == rounds for row, rounds in rows if "median_seconds" in row
    )


WORK = {"encoder": "encode", "decoder": "decode"}
SHOWN_IN_SHORT = ("diffusers", "fastvae", "fastvae, frozen")
VERSIONS = ("torch", "triton", "diffusers", "onnxruntime", "openvino")
TABLES = {
    "pipeline": pipeline_table,
    "ops": ops_table,
    "encoder": lambda result: network_tables(result, "encoder"),
    "decoder": lambda result: network_tables(result, "decoder"),
    "profile": profile_table,
    "networks": networks_table,
}


def _drawn(result: Mapping[str, Any], table: str) -> str:
    """Return the SVG of a table, or "" if it has none."""
    if table == "profile":
        entries = list(result.get("profiles", {}).values())
        return pictures.stacks(entries) if entries else ""
    rows = [entry for entry in result.get("networks", {}).values() if entry["part"] == table]
    timed = [entry for entry in rows if any("median_seconds" in row for row in entry["contestants"].values())]
    return pictures.medians(timed) if timed else ""


def section(path: Path, result: Mapping[str, Any], table: str) -> list[str]:
    """Return a table, its picture if it has one, and its origin; no lines if nothing was measured."""
    lines = TABLES[table](result)
    if not lines:
        return []
    if _drawn(result, table):
        lines = [*lines, f"![{table}: the table above as bars](images/{path.parent.name}-{table}.svg)", ""]
    return [*lines, networks_origin(result) if table == "networks" else origin(result, table)]


def _read(path: Path) -> Mapping[str, Any]:
    result = json.loads(path.read_text())
    if result["dry"]:
        raise ValueError(f"{path.parent.name}/{path.name} is of a dry run: it has no times")
    return result


def _devices(root: Path, pattern: str) -> list[str]:
    """Return all tables of every GPU, each GPU under a heading."""
    lines: list[str] = []
    for path in sorted(root.glob(pattern)):
        result = json.loads(path.read_text())
        if result["dry"] or result["device"] == "cpu":
            continue
        sections = [section(path, result, table) for table in TABLES if table != "networks"]
        lines += [f"### {result['device']}", "", *(line for found in sections if found for line in [*found, ""])]
    return lines[:-1]


def with_results(text: str, root: Path = ROOT) -> str:
    """Return ``text`` with every section of results rewritten; a section without a result says that.

    Raises ValueError for the results of a dry run and for an unknown table.
    """

    def written(found: re.Match) -> str:
        table, path = found["table"], root / found["file"]
        if table == "devices":
            lines = _devices(root, found["file"])
        elif table in TABLES:
            lines = section(path, _read(path), table) if path.exists() else []
        else:
            raise ValueError(f"TABLE must be one of {', '.join(TABLES)} or devices, got {table!r}")
        return found[1] + "\n".join(lines or [NOT_YET]) + f"\n{found[4]}"

    return SECTION.sub(written, text)


def drawings(root: Path = ROOT) -> dict[str, str]:
    """Return name -> SVG of every picture of the results."""
    made = {}
    for path in sorted(root.glob(RESULTS)):
        result = json.loads(path.read_text())
        if not result["dry"]:
            found = {table: _drawn(result, table) for table in TABLES}
            made |= {f"{IMAGES}/{path.parent.name}-{table}.svg": svg for table, svg in found.items() if svg}
    return made


def write(root: Path = ROOT) -> list[str]:
    """Write the tables of every page and the pictures; return the names of changed files."""
    made = {name: with_results((root / name).read_text(), root) for name in PAGES} | drawings(root)
    changed = []
    for name, new in made.items():
        path = root / name
        if not path.exists() or path.read_text() != new:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(new)
            changed.append(name)
    return changed


if __name__ == "__main__":
    print("written: " + (", ".join(write()) or "nothing, all tables agree with their results"))
