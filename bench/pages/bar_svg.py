"""Bar charts of results as SVG: medians of a network's contestants with their intervals, and profiles of a pass.

The SVG is written here and not by a plotting library: its bytes depend only on the results, so a test compares each
picture with its data on any machine, and a picture has a few kilobytes. Colours follow the light or dark scheme.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from bench.timing import profiles

WIDTH, LABELS, NUMBERS = 760, 190, 70  # pixels: total, left of the bars, right of them
LINE, BAR, GAP = 22, 15, 26
# Hues that colour-blind readers can distinguish (Okabe and Ito); a group has the same colour in every bar.
COLOURS = {
    "convolution": "#56708a", "convolution + residual": "#8aa4bd", "GroupNorm": "#d55e00", "SiLU": "#e69f00",
    "attention and products": "#cc79a7", "residual and bias": "#b8a300", "copies": "#999999", "upsampling": "#7a5195",
    profiles.OUTSIDE: "#c9c9c9", profiles.OTHER: "#e2e2e2",
}  # fmt: skip
FUSED = ("#009e73", "#00c08b", "#00785a", "#4fd1a5", "#005f46", "#8fe3c4", "#2aa198", "#66b2a0")
STYLE = """<style>
text { font: 12px sans-serif; fill: #24292f } .title { font-weight: bold } .ours { fill: #4a90e2 }
.other { fill: #8b949e } .end { text-anchor: end } line { stroke: #24292f }
@media (prefers-color-scheme: dark) { text { fill: #e4e7eb } line { stroke: #e4e7eb } }
</style>"""


class Drawing:
    """An SVG that is drawn line by line, from top to bottom. label: its description for screen readers."""

    def __init__(self, label: str):
        self.label, self.parts, self.y = label, [], 8

    def text(self, x: float, words: str, kind: str = "") -> None:
        """Add text on the current line."""
        self.parts.append(f'<text x="{x:.1f}" y="{self.y + 12}" class="{kind}">{escape(words)}</text>')

    def bar(self, x: float, width: float, look: str, says: str) -> None:
        """Add a bar on the current line; ``says`` is its tooltip."""
        place = f'x="{x:.1f}" y="{self.y}" width="{width:.1f}" height="{BAR}"'
        self.parts.append(f"<rect {place} {look}><title>{escape(says)}</title></rect>")

    def whisker(self, low: float, high: float) -> None:
        """Add an interval on the current line."""
        middle = self.y + BAR / 2
        for x1, x2, y1, y2 in ((low, high, middle, middle), *((x, x, middle - 3, middle + 3) for x in (low, high))):
            self.parts.append(f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1}" y2="{y2}"/>')

    def done(self) -> str:
        """Return the SVG."""
        size = f'width="{WIDTH}" height="{self.y}" viewBox="0 0 {WIDTH} {self.y}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label={quoteattr(self.label)}>'
        return "\n".join([head, STYLE, *self.parts, "</svg>"]) + "\n"


def title(entry: Mapping[str, Any]) -> str:
    """Return the title of a network's case or a profile."""
    dtype = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[entry["dtype"]]
    return f"{entry['part']}, {entry['preset']}, {entry['batch']} x {entry['side']}², {dtype}"


def milliseconds(seconds: float) -> str:
    """Return milliseconds with three digits."""
    value = 1e3 * seconds
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f}"


def medians(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw a panel for each case: a bar for the median of every timed contestant, with its 95 % interval."""
    drawing = Drawing("Medians and 95 % intervals in milliseconds, shorter is faster")
    for entry in entries:
        timed = {name: row for name, row in entry["contestants"].items() if "median_seconds" in row}
        if not timed:
            continue
        ends = {name: row["interval"] or (row["median_seconds"],) * 2 for name, row in timed.items()}
        scale = (WIDTH - LABELS - NUMBERS) / max(high for _, high in ends.values())
        beside = ", with torch.compile" if entry["compiled"] else ""
        drawing.text(8, f"{title(entry)}{beside}: median, ms, with its 95 % interval", "title")
        drawing.y += GAP
        for name, row in timed.items():
            low, high = ends[name]
            middle, kind = row["median_seconds"], "ours" if name.startswith("fastvae") else "other"
            drawing.text(LABELS - 8, name, "end")
            drawing.bar(LABELS, scale * middle, f'class="{kind}"', f"{name}: {milliseconds(middle)} ms")
            if row["interval"]:
                drawing.whisker(LABELS + scale * low, LABELS + scale * high)
            drawing.text(LABELS + scale * high + 8, milliseconds(middle))
            drawing.y += LINE
        drawing.y += LINE // 2
    return drawing.done()


def stacks(entries: Sequence[Mapping[str, Any]]) -> str:
    """Draw a panel for each profile: one stacked bar a contestant, with a legend below."""
    drawing = Drawing("Time of a pass in milliseconds, by groups of operators or kernels")
    panels = [(entry, profiles.shown(entry["contestants"])) for entry in entries]
    names = list(dict.fromkeys(name for _, rows in panels for groups in rows.values() for name in groups))
    fused = sorted(name for name in names if name.startswith(profiles.FUSED))
    colours = COLOURS | {name: FUSED[i % len(FUSED)] for i, name in enumerate(fused)}
    for entry, rows in panels:
        totals = {name: sum(groups.values()) for name, groups in rows.items()}
        scale = (WIDTH - LABELS - NUMBERS) / max(totals.values())
        drawing.text(8, f"{title(entry)}: ms in {entry['counted']}", "title")
        drawing.y += GAP
        for name, groups in rows.items():
            drawing.text(LABELS - 8, name, "end")
            x = float(LABELS)
            for label, seconds in groups.items():
                says = f"{name}, {label}: {milliseconds(seconds)} ms"
                drawing.bar(x, scale * seconds, f'fill="{colours[label]}"', says)
                x += scale * seconds
            drawing.text(x + 8, milliseconds(totals[name]))
            drawing.y += LINE
        drawing.y += LINE // 2
    for i, name in enumerate(names):
        column = i % 3
        x = 8 + column * (WIDTH - 16) / 3
        drawing.bar(x, BAR, f'fill="{colours[name]}"', name)
        drawing.text(x + BAR + 6, name)
        if column == 2 or i == len(names) - 1:
            drawing.y += LINE
    return drawing.done()
