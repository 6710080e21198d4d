"""fastvae tune"""

from __future__ import annotations

from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import echo, echo_error, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@options.vae
@options.model_location
@options.preset
@click.option(
    "--size",
    "sizes",
    type=click.IntRange(min=1),
    multiple=True,
    help="Side in pixels, may be repeated. Default: 256 and 512; on a GPU also 1024.",
)
@options.dtype
@options.device
@click.option(
    "--seconds",
    type=click.FloatRange(min=0),
    default=2,
    show_default=True,
    help="Approximate time to measure one layer.",
)
@click.option("--again", is_flag=True, help="Measure also what an earlier run has measured.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@click.option("-q", "--quiet", is_flag=True, help="Print no progress.")
@errors_as_sentences
def tune(as_json: bool, quiet: bool, **given: Any) -> None:
    """Find the fastest form of each convolution on this device.

    Measures every 3x3 convolution as the library's and as Winograd's, on a GPU upsampling ones also by four taps, and
    keeps the fastest form where encode and decode with these weights, at 256 and 1024 pixels, stay within the allowed
    error. accelerate and the command line then use the table that this writes to your cache folder. An interrupted run
    goes on where it was.

    \b
    Example:
      fastvae tune --vae stabilityai/sdxl-vae --size 512
    """
    from fastvae.report.tuning.tune import tune as measure

    say = (lambda line: None) if quiet else (lambda line: echo_error(strip_control_characters(line)))
    results = measure(say=say, **given)
    if as_json:
        echo_json(results)
        return
    for line in _lines(results):
        echo(strip_control_characters(line))


def _lines(results: dict[str, Any]) -> list[str]:
    from fastvae.fast.forms.form import Form
    from fastvae.report.number_format import number

    measured = {name for layer in results["layers"] for name in layer["milliseconds"]}
    forms = [form for form in Form if form is not Form.DIRECT and form in measured]
    lines = [f"{'layer':34}{'pixels':>9}{'direct ms':>11}" + "".join(f"{form:>12}{'error':>7}" for form in forms)]
    for layer in results["layers"]:
        taken, ratios = layer["milliseconds"], layer["error_ratio"]
        cells = "".join(
            f"{'x ' + number(taken[Form.DIRECT] / taken[form]):>12}{number(ratios[form], 2):>7}"
            if form in taken
            else f"{'none':>12}{'':>7}"
            for form in forms
        )
        refused = f" (refused: {', '.join(layer['refused'])})" if layer["refused"] else ""
        lines.append(
            f"{layer['layer']:34}{layer['pixels']:>9}{number(taken[Form.DIRECT]):>11}{cells}  {layer['form']}{refused}"
        )
    lines.append("x: times the direct form's speed; error: times that of eager torch, rms against float64")
    for check in results["checks"]:
        lines.append(
            f"{check['task']} {check['size']}x{check['size']}: errors are {number(check['largest'], 2)} (largest) and "
            f"{number(check['rms'], 2)} (rms) of what is allowed"
        )
    for row in results["won"]:
        lines.append(
            f"{row['task']} {row['size']}x{row['size']}: {number(row['direct_ms'])} ms with the direct form, "
            f"{number(row['tuned_ms'])} ms tuned"
        )
    return [*lines, f"written: {results['table']}"]
