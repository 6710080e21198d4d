"""The README's table of results, written from the results themselves.

    python bench/tables.py

Between `<!-- results: FILE -->` and `<!-- end -->` stands what FILE holds; a test compares the two.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECTION = re.compile(r"(<!-- results: (?P<file>\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
NAMES = {"diffusers": "diffusers at its defaults (fp32)", "fp32": "fastvae, fp32", "bf16": "fastvae, bf16"}


def encode_folder_table(result: dict) -> str:
    """The table of bench/encode_folder.py's result."""
    lines = ["| | images/s | times diffusers | error of the mean, rms, as a share of its spread |", "|---|---|---|---|"]
    for name, rate in result["images_per_second"].items():
        error = result["error_share"].get(name)
        shown = "compared with" if error is None else f"{100 * error:.2f} %"
        lines.append(f"| {NAMES[name]} | {rate:.2f} | {result['times_diffusers'][name]:.2f} | {shown} |")
    lines += [
        "",
        f"{result['threads']} threads of {result['processor']}, {result['images']} photographs, medians of "
        f"{len(result['seconds']['diffusers'])} rounds, torch {result['versions']['torch']}, diffusers "
        f"{result['versions']['diffusers']}, measured at commit {result['commit'][:12]}.",
    ]
    return "\n".join(lines)


def with_results(text: str) -> str:
    """``text`` with every section of results written anew."""

    def written(section: re.Match) -> str:
        result = json.loads((ROOT / section["file"]).read_text())
        return f"{section[1]}{encode_folder_table(result)}\n{section[3]}"

    return SECTION.sub(written, text)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_results(readme.read_text()))
