"""Bar charts of images per second with intervals, as SVG, drawn by matplotlib without global state or a window."""

from __future__ import annotations

import io
from typing import Any

from fastvae.report.number_format import number

WIDTH, BAR, MARGIN = 7.2, 0.42, 0.75  # inches
# In both schemes a bar has a contrast of at least 3:1 with the page's background and with the lines of the intervals.
COLOURS = {
    False: {"text": "#24292f", "first": "#4a90e2", "others": "#8b949e"},
    True: {"text": "#e4e7eb", "first": "#3b7dd8", "others": "#66707b"},
}


def bars(rows: list[dict[str, Any]], *, dark: bool = False) -> str:
    """Return the SVG of a bar for each row (``contestant``, ``images_per_second`` and its ``_interval`` or None)."""
    import matplotlib
    from matplotlib.figure import Figure

    colours = COLOURS[dark]
    values = [row["images_per_second"] for row in rows]
    ends = [row["images_per_second_interval"] or (value, value) for row, value in zip(rows, values, strict=True)]
    errors = [
        [max(0.0, value - low) for value, (low, _) in zip(values, ends, strict=True)],
        [max(0.0, high - value) for value, (_, high) in zip(values, ends, strict=True)],
    ]
    # A fixed salt and no date: the same results give the same bytes.
    with matplotlib.rc_context({"svg.hashsalt": "fastvae", "svg.fonttype": "path", "font.size": 11}):
        figure = Figure(figsize=(WIDTH, MARGIN + BAR * len(rows)), layout="constrained")
        axes = figure.subplots()
        shown = [colours["first"]] + [colours["others"]] * (len(rows) - 1)
        places = range(len(rows))
        axes.barh(places, values, 0.62, color=shown, xerr=errors, ecolor=colours["text"], capsize=4)
        widest = max(high for _, high in ends)
        for place, value, (_, high) in zip(places, values, ends, strict=True):
            axes.text(high + 0.015 * widest, place, number(value), va="center", color=colours["text"])
        axes.set_yticks(places, [row["contestant"] for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.14 * widest)
        axes.set_xlabel("images per second, with the 95 % interval of the median", color=colours["text"])
        axes.tick_params(colors=colours["text"], length=0)
        axes.spines[:].set_visible(False)
        axes.spines["left"].set(visible=True, color=colours["text"])
        written = io.StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None})
    return written.getvalue()
