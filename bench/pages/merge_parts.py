"""Merge the results of bench/device.sh into one file a device, with the data and the status of each part.

    python -m bench.pages.merge_parts FOLDER PART=STATUS ...

FOLDER/PART.json is merged into FOLDER/results.json, which has the format that `make bench` writes for a CPU. A part
that was run again replaces only its own data: each part keeps its commit, versions, roof and status. Results of another
device or of a dry run are replaced completely.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Part -> key of its data in a results file. The kernel tests and the search for tiles have no data.
DATA = {"ops": "cases", "philox": "generator", "encoder": "networks", "decoder": "networks", "profile": "profiles",
        "loader": "loader", "resize": "resize", "winograd": "winograd", "upsample": "upsample",
        "compile": "networks"}  # fmt: skip
EMPTY = ("cases", "networks", "pipeline", "generator", "profiles", "loader", "winograd", "upsample", "resize")
OF_A_PART = (*EMPTY, "passed", "failed", "roof")


def merged(
    old: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], ended: Mapping[str, tuple[str, list[str]]]
) -> dict[str, Any]:
    """Return ``old`` with the parts that ran.

    found: part -> its results, or only the machine's facts if it wrote none; ended: part -> (status, names of failed
    tests).
    """
    facts = next(iter(found.values()))
    same = old.get("dry") == facts["dry"] and old.get("device") == facts["device"]
    data: dict[str, Any] = {name: dict(old.get(name, {})) if same else {} for name in EMPTY}
    parts = dict(old.get("parts", {})) if same else {}
    for name, result in found.items():
        key = DATA.get(name)
        if key == "networks":
            data[key] = {case: entry for case, entry in data[key].items() if _measured_by(entry) != name}
        elif key:
            data[key] = {}
        if key:
            data[key] |= result.get(key, {})
        status, failed = ended[name]
        kept = {word: value for word, value in result.items() if word not in (*EMPTY, "dry")}
        parts[name] = kept | {"status": status, "passed": status == "passed", "failed": failed}
    common = {word: value for word, value in facts.items() if word not in OF_A_PART}
    return common | {"passed": all(part["passed"] for part in parts.values()), "parts": parts} | data


def _measured_by(entry: Mapping[str, Any]) -> str:
    """Return the part of bench/device.sh that measures a network: torch.compile has one of its own."""
    return "compile" if entry.get("compiled") else entry["part"]


def failures(log: Path) -> list[str]:
    """Return the names of the failed tests in a part's log."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR ")) and len(line.split()) > 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the parts' results and logs")
    parser.add_argument("parts", nargs="+", metavar="PART=STATUS", help="status of each part")
    parser.add_argument("--dry", action="store_true", help="the parts are of a dry run")
    chosen = parser.parse_args(arguments)
    statuses = dict(word.split("=", 1) for word in chosen.parts)
    written = {name: chosen.folder / f"{name}.json" for name in statuses}
    found = {name: json.loads(path.read_text()) for name, path in written.items() if path.exists()}
    ended = {
        name: (status, found[name]["failed"] if name in found else failures(chosen.folder / f"{name}.log"))
        for name, status in statuses.items()
    }
    facts = next(iter(found.values()), None)
    if facts is None:
        from bench.timing.environment import surroundings  # loads torch

        facts = surroundings() | {"dry": chosen.dry}
    bare = {word: value for word, value in facts.items() if word not in OF_A_PART}
    target = chosen.folder / "results.json"
    old = json.loads(target.read_text()) if target.exists() else {}
    results = merged(old, {name: found.get(name, bare) for name in statuses}, ended)
    target.write_text(json.dumps(results, indent=1) + "\n")
    for path in written.values():
        path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
