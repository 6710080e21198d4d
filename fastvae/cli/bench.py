"""fastvae bench"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import OTHER, echo, echo_error, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@options.vae
@options.model_location
@options.preset
@click.option(
    "--size", "sizes", type=click.IntRange(min=1), multiple=True, help="Side in pixels, may be repeated. Default: 256."
)
@click.option(
    "--batch", "batches", type=click.IntRange(min=1), multiple=True, help="Images a call, may be repeated. Default: 1."
)
@click.option(
    "--task",
    type=click.Choice(["encode", "decode", "both"]),
    default="both",
    show_default=True,
    help="Task to measure.",
)
@options.dtype
@options.device
@click.option("--compile", "compiled", is_flag=True, help="Also measure torch.compile; compiling takes a minute.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=15,
    show_default=True,
    help="Approximate time to measure; a slow model takes longer.",
)
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True),
    help="Write the report as one HTML file without external resources.",
)
@click.option(
    "--json",
    "json_file",
    metavar="[FILE]",
    is_flag=False,
    flag_value="-",
    type=click.Path(dir_okay=False, writable=True, allow_dash=True),
    help="Write one JSON document, to FILE or instead of the table.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@click.pass_context
@errors_as_sentences
def bench(
    context: click.Context,
    sizes: tuple[int, ...],
    batches: tuple[int, ...],
    task: str,
    html: str | None,
    json_file: str | None,
    quiet: bool,
    **given: Any,
) -> None:
    """Measure encode and decode on this machine, beside diffusers.

    Both have the same weights, and a time is shown only after a check of the results.

    \b
    Example:
      fastvae bench --vae stabilityai/sdxl-vae --size 512 --html report.html
    """
    for name, path in (("html", html), ("json", json_file)):
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{name} must be a file in a folder that is there, got {path!r}")
    if html is not None:
        from fastvae.report.page import check_extra

        check_extra()  # before a minute of measuring
    from fastvae.report.benchmark import benchmark, is_right

    results = benchmark(
        sizes=sizes or (256,),
        batches=batches or (1,),
        tasks=("encode", "decode") if task == "both" else (task,),
        say=(lambda line: None) if quiet else lambda line: echo_error(strip_control_characters(line)),
        **given,
    )
    if json_file == "-":
        echo_json(results)
    else:
        for line in _lines(results):
            echo(strip_control_characters(line))
    _write(results, html, json_file)
    if not is_right(results):
        context.exit(OTHER)


def _write(results: dict[str, Any], html: str | None, json_file: str | None) -> None:
    if json_file not in (None, "-"):
        from fastvae.system.strict_json import strict_json

        Path(json_file).write_text(strict_json(results) + "\n", encoding="utf-8")
    if html is not None:
        from fastvae.report.page import page

        Path(html).write_text(page(results), encoding="utf-8")


def _lines(results: dict[str, Any]) -> list[str]:
    from fastvae.report.number_format import interval, megabytes, number

    lines = []
    for case in results["cases"]:
        beside = f"x {case['baseline']}" if case["baseline"] else ""
        lines.append(f"{case['name']}, {results['dtype']} on {results['device']}, medians of {case['rounds']} rounds")
        lines.append(f"  {'':24}{'images/s':>10}  {'ms':>8}  {'95 % interval':>18}{beside:>14}{'MB':>14}{'error':>9}")
        for row in case["rows"]:
            if row["milliseconds"] is None:
                lines.append(f"  {row['contestant']:24}{row['reason']}")
                continue
            rate, times = number(row["images_per_second"]), number(row["times_baseline"])
            memory = "not measured" if row["memory_bytes"] is None else megabytes(row["memory_bytes"])
            lines.append(
                f"  {row['contestant']:24}{rate:>10}  {number(row['milliseconds']):>8}  "
                f"{interval(row['milliseconds_interval']):>18}{times:>14}{memory:>14}{number(row['error'], 2):>9}"
            )
    return lines
