"""The picture of docs/architecture.md: packages as boxes, imports as arrows, drawn from the code's own imports.

    python -m bench.pages.architecture_svg      writes docs/images/architecture.svg (make report)

An arrow that a longer chain of arrows implies is left out. A new package needs a place in PLACES.
"""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from bench.pages.import_graph import ROOT, graph, reduced

PICTURE = ROOT / "docs" / "images" / "architecture.svg"
# Package -> (column, row) of its box; a package imports only what is in a lower row. data/ is opened up.
PLACES: Mapping[str, tuple[float, float]] = {
    "cli": (1.5, 0), "report": (3.5, 1),
    "data/exporting": (0.85, 2.2), "data/decoding": (1.9, 2.2),
    "data/datasets": (0.3, 3.2), "data/encoding": (3.05, 3.2), "training": (4.7, 4.2),
    "data/store": (1.1, 4.2), "data/sources": (2.1, 4.2),
    "data/images": (2.1, 5.2),
    "data/rows.py": (1.45, 6.2),
    "fast": (3.0, 7.4),
    "models": (3.75, 8.4),
    "latents": (0.3, 9.4), "checkpoints": (3.3, 9.4),
    "fastvae_kernels": (0.3, 10.4), "system": (1.6, 10.4), "tiling.py": (4.2, 10.4), "metrics.py": (5.2, 10.4),
}  # fmt: skip
LEFT_OUT = ("__main__", "_version")
COLUMN, ROW, WIDTH, HEIGHT = 140, 62, 116, 30
MARGIN = 70
STYLE = """<style>
text { font: 13px sans-serif; fill: #24292f; text-anchor: middle } .frame { fill: none; stroke: #8b949e }
.name { font-size: 12px; text-anchor: start; font-weight: bold }
rect { fill: #eef4fb; stroke: #4a90e2 } .kernels { fill: #e2f5ee; stroke: #009e73 }
.arrow { stroke: #6e7781; fill: none } .head { fill: #6e7781 }
@media (prefers-color-scheme: dark) {
text { fill: #e4e7eb } rect { fill: #1f2d3d } .kernels { fill: #17332a }
.arrow { stroke: #9aa4ae } .head { fill: #9aa4ae }
}
</style>"""


def package_of(module: str) -> str | None:
    """Return the name in PLACES of the box that ``module`` is in, or None where it is in no picture."""
    top, *rest = module.split(".")
    if top == "fastvae_kernels":
        return top
    if top != "fastvae" or rest[0] in LEFT_OUT or rest == ["data"]:
        return None
    parts = rest[:2] if rest[0] == "data" else rest[:1]
    return "/".join(parts) + ("" if (ROOT / "fastvae").joinpath(*parts).is_dir() else ".py")


def packages() -> dict[str, set[str]]:
    """Return box -> the boxes that it imports, without the imports that a longer chain implies."""
    found: dict[str, set[str]] = {}
    for module, targets in graph().items():
        if source := package_of(module):
            named = {name for target in targets if (name := package_of(target))}
            found.setdefault(source, set()).update(named - {source})
    return reduced(found)


def _corner(name: str) -> tuple[float, float]:
    column, row = PLACES[name]
    return MARGIN + column * COLUMN - WIDTH / 2, 12 + row * ROW


def _port(x: float, towards: list[str], name: str) -> float:
    """Return where an arrow meets a box that starts at ``x``: arrows are spread by the places of their other ends."""
    ordered = sorted(towards, key=lambda other: PLACES[other][0])
    return x + WIDTH * (ordered.index(name) + 1) / (len(ordered) + 1)


def picture() -> str:
    """Return the SVG. Raises ValueError for a package that has no place, and for an arrow that would point up."""
    arrows = packages()
    if arrows.keys() != PLACES.keys():
        raise ValueError(
            f"PLACES must name the packages that there are; differing: {sorted(arrows.keys() ^ PLACES.keys())}"
        )
    sources: dict[str, list[str]] = {name: [a for a in arrows if name in arrows[a]] for name in arrows}
    parts = []
    for name, targets in arrows.items():
        for target in sorted(targets):
            if PLACES[target][1] <= PLACES[name][1]:
                raise ValueError(f"{name} imports {target}: PLACES must have {target} in a lower row")
            (x1, y1), (x2, y2) = _corner(name), _corner(target)
            x1, x2 = _port(x1, list(targets), target), _port(x2, sources[target], name)
            line = f"M{x1:.0f} {y1 + HEIGHT:.0f} L{x2:.0f} {y2 - 6:.0f}"
            parts.append(f'<path class="arrow" marker-end="url(#head)" d="{line}"/>')
    inside = [_corner(name) for name in PLACES if name.startswith("data/")]
    left, top = min(x for x, _ in inside) - 12, min(y for _, y in inside) - 26
    right, bottom = max(x for x, _ in inside) + WIDTH + 12, max(y for _, y in inside) + HEIGHT + 12
    frame = f'x="{left:.0f}" y="{top:.0f}" width="{right - left:.0f}" height="{bottom - top:.0f}"'
    parts.append(
        f'<rect class="frame" rx="6" {frame}/><text class="name" x="{left + 8:.0f}" y="{top + 16:.0f}">data</text>'
    )
    for name in PLACES:
        x, y = _corner(name)
        look = ' class="kernels"' if name == "fastvae_kernels" else ""
        parts.append(f'<rect{look} rx="4" x="{x:.0f}" y="{y:.0f}" width="{WIDTH}" height="{HEIGHT}"/>')
        label = escape(name.removeprefix("data/"))
        parts.append(f'<text x="{x + WIDTH / 2:.0f}" y="{y + HEIGHT / 2 + 4.5:.1f}">{label}</text>')
    ends = [_corner(name) for name in PLACES]
    width, height = max(x for x, _ in ends) + WIDTH + 12, max(y for _, y in ends) + HEIGHT + 12
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" role="img" '
    head += f'viewBox="0 0 {width:.0f} {height:.0f}" aria-label="Packages of fastvae and what each imports">'
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="4" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    )
    marker += '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>'
    return "\n".join([head, STYLE, marker, *parts, "</svg>"]) + "\n"


def main() -> None:
    PICTURE.write_text(picture())
    print(f"{PICTURE.relative_to(ROOT)} written")


if __name__ == "__main__":
    main()
