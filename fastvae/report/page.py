"""HTML page of a benchmark or a comparison: one file with tables, bars, machine and fallbacks, without requests."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvae.report.number_format import interval, megabytes, number

if TYPE_CHECKING:
    from fastvae.report.compare import Comparison

NEEDED = ("jinja2", "matplotlib")


def check_extra() -> None:
    """Raise ImportError, naming the extra, if a package that draws the page is not installed."""
    for name in NEEDED:
        try:
            import_module(name)
        except ImportError:
            raise ImportError(f"the HTML report needs {name}: pip install jinja2 matplotlib") from None


def page(results: Mapping[str, Any]) -> str:
    """Return the HTML page of a result: one file with its pictures, which makes no requests and runs no script.

    results: ``title`` and ``cases``. Each case has a ``name`` and ``rows``; each row has a ``contestant`` and the known
    values of fastvae.report.benchmark.Row. Optional: ``model``, ``machine``, ``versions`` (names and values),
    ``explain`` (name, path, reason, launches, bytes), ``notes`` (sentences), and ``baseline`` of a case. Raises
    ImportError, naming the extra, if jinja2 or matplotlib is missing, and ValueError for a result without title or
    cases.
    """
    template = _template("page.html.jinja")
    missing = [name for name in ("title", "cases") if name not in results]
    if missing:
        raise ValueError(f"results must have a title and cases, got none called {missing[0]!r}")
    return template.render(
        title=results["title"],
        model=_facts(results, "model"),
        machine=_facts(results, "machine"),
        versions=_facts(results, "versions"),
        explain=results.get("explain") or [],
        notes=results.get("notes") or [],
        settings=_settings(results),
        cases=[_case(case) for case in results["cases"]],
    )


def comparison_page(source: str, found: Comparison) -> str:
    """Return the HTML page of a comparison, one file like ``page``. source: the model's name.

    Raises ImportError, naming the extra, if jinja2 or matplotlib is missing.
    """
    return _template("comparison.html.jinja").render(source=source, found=found)


def _template(name: str) -> Any:
    check_extra()
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"number": number, "interval": interval, "megabytes": megabytes}
    return environment.from_string((Path(__file__).parent / name).read_text(encoding="utf-8"))


def _settings(results: Mapping[str, Any]) -> list[str]:
    named = [(results.get("model") or {}).get("source"), results.get("device"), results.get("dtype")]
    return [str(value) for value in named if value is not None]


def _facts(results: Mapping[str, Any], name: str) -> dict[str, str]:
    facts = results.get(name) or {}
    return {key.replace("_bytes", "").replace("_", " "): _shown(key, value) for key, value in facts.items()}


def _shown(key: str, value: Any) -> str:
    if key.endswith("_bytes"):
        return f"{megabytes(value)} MB"
    return f"{value:,}" if isinstance(value, int) and value > 9999 else str(value)


def _case(case: Mapping[str, Any]) -> dict[str, Any]:
    blank = dict.fromkeys(
        ("reason", "error", "allowed_error", "milliseconds", "milliseconds_interval", "images_per_second")
    )
    blank |= dict.fromkeys(("images_per_second_interval", "times_baseline", "memory_bytes"))
    rows = [{**blank, **row} for row in case["rows"]]
    timed = [row for row in rows if row["images_per_second"] is not None]
    labels = [f"{row['contestant']} {number(row['images_per_second'])}{_between(row)}" for row in timed]
    return {
        "name": case["name"],
        "rounds": case.get("rounds"),
        "baseline": case.get("baseline"),
        "rows": rows,
        "columns": [
            name
            for name, always in (("times_baseline", False), ("memory_bytes", True), ("error", False))
            # A column of memory that was not measured is shown; one that no row has is not.
            if any(row.get(name) is not None or (always and name in row) for row in case["rows"])
        ],
        "pictures": _pictures(timed) if timed else None,
        "alt": "Bars of images per second: " + ", ".join(labels) + ".",
    }


def _between(row: Mapping[str, Any]) -> str:
    between = interval(row["images_per_second_interval"])
    return f" ({between})" if between else ""


def _pictures(rows: list[dict[str, Any]]) -> dict[str, str]:
    from fastvae.report.bar_chart import bars

    drawn = {scheme: bars(rows, dark=scheme == "dark").encode() for scheme in ("light", "dark")}
    return {name: "data:image/svg+xml;base64," + base64.b64encode(svg).decode() for name, svg in drawn.items()}
