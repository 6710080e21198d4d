"""The results of bench/device.sh as one file a device: each part's data side by side, and how each part ended.

    python -m bench.pages.merge_parts FOLDER PART=STATUS ...

FOLDER/PART.json goes into FOLDER/results.json, the same file that `make bench` writes for a CPU. A part that was run
again replaces its own data alone, so each keeps its commit, versions and roof, and whether it passed; what another
device or a dry run left there is replaced as a whole.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# Where a part's data stand in a results file. The kernel tests and the search for tiles have none.
DATA = {"ops": "cases", "philox": "generator", "encoder": "networks", "decoder": "networks", "profile": "profiles",
        "loader": "loader"}  # fmt: skip
EMPTY = ("cases", "networks", "pipeline", "generator", "profiles", "loader")
OF_A_PART = (*EMPTY, "passed", "failed", "roof")


def merged(
    old: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]], ended: Mapping[str, tuple[str, list[str]]]
) -> dict[str, Any]:
    """The whole result: ``old`` with the parts that ran.

    found: part -> what it wrote, or the machine's facts alone where it wrote nothing; ended: part -> (status, the names
    of what failed).
    """
    facts = next(iter(found.values()))
    same = old.get("dry") == facts["dry"] and old.get("device") == facts["device"]
    whole: dict[str, Any] = {name: dict(old.get(name, {})) if same else {} for name in EMPTY}
    parts = dict(old.get("parts", {})) if same else {}
    for name, result in found.items():
        key = DATA.get(name)
        if key == "networks":
            whole[key] = {case: entry for case, entry in whole[key].items() if entry["part"] != name}
        elif key:
            whole[key] = {}
        if key:
            whole[key] |= result.get(key, {})
        status, failed = ended[name]
        kept = {word: value for word, value in result.items() if word not in (*EMPTY, "dry")}
        parts[name] = kept | {"status": status, "passed": status == "passed", "failed": failed}
    alone = {word: value for word, value in facts.items() if word not in OF_A_PART}
    return alone | {"passed": all(part["passed"] for part in parts.values()), "parts": parts} | whole


def failures(log: Path) -> list[str]:
    """The names of the tests that a part's log calls failed."""
    if not log.exists():
        return []
    lines = log.read_text(errors="replace").splitlines()
    return [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR ")) and len(line.split()) > 1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the parts' results and logs are")
    parser.add_argument("parts", nargs="+", metavar="PART=STATUS", help="how each part ended")
    parser.add_argument("--dry", action="store_true", help="they are of a dry run")
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
    whole = merged(old, {name: found.get(name, bare) for name in statuses}, ended)
    target.write_text(json.dumps(whole, indent=1) + "\n")
    for path in written.values():
        path.unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
