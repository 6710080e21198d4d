"""fastvae plan-hardware SRC"""

from __future__ import annotations

from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command("plan-hardware")
@click.argument("src", type=click.Path())
@options.vae
@options.model_location
@options.preset
@click.option("--buckets", default="512", show_default=True, help="Sizes by aspect ratio, as in encode.")
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Pictures of the sample.")
@options.dtype
@options.device
@click.option(
    "--encode-ms",
    type=float,
    help="Milliseconds of an image on another device, instead of encoding here.",
)
@click.option(
    "--resize-ms",
    type=float,
    help="Milliseconds of an image's resize on that device. Default: 0.02, predicted for an H100.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the lines.")
@errors_as_sentences
def plan_hardware(as_json: bool, **given: Any) -> None:
    """Say how many cores a GPU needs for your pictures.

    Reads a sample of the pictures of SRC, spread evenly over it, and times decode, resize and encode. From these follow
    the cores that keep the device busy, the stage that is the bottleneck on this machine, and the rate.

    \b
    Example:
      fastvae plan-hardware photographs/ --vae stabilityai/sdxl-vae
    """
    from fastvae.report.hardware_plan import plan_hardware as plan
    from fastvae.report.hardware_plan import sentences

    found = plan(**given)
    if as_json:
        echo_json(found)
        return
    for line in sentences(found):
        echo(strip_control_characters(line))
