"""fastvae encode SRC OUT"""

from __future__ import annotations

from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import FAILURES, echo, foreseen
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("src", nargs=-1, required=True)
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--vae", default="tiny", show_default=True, help='A directory, a Hub id, or "tiny", which is built in.')
@options.place_in_model
@click.option(
    "--buckets",
    default="256",
    show_default=True,
    help="Sizes by aspect ratio: a side in pixels, sdxl, flux, a JSON file, or scaled as in sdxl@256.",
)
@click.option(
    "--crop",
    type=click.Choice(["centre", "random"]),
    default="centre",
    show_default=True,
    help="What is cut out of an image that covers its bucket.",
)
@click.option("--variants", type=click.IntRange(min=1), default=1, show_default=True, help="Random crops an image.")
@click.option("--flip", is_flag=True, help="Encode each mirrored as well.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of random crops and of --posterior sample.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: what suits the device.")
@options.device
@click.option(
    "--posterior",
    type=click.Choice(["dist", "mean", "sample"]),
    default="dist",
    show_default=True,
    help="Store mean and log-variance, the mean alone, or one draw.",
)
@click.option(
    "--logvar",
    type=click.Choice(["fp16", "u8"]),
    default="fp16",
    show_default=True,
    help="How log-variances are stored.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="How means are stored.",
)
@options.work
@click.option(
    "--shard-mb", type=float, default=256, show_default=True, help="Size of a shard; a kill loses two at most."
)
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "fail"]),
    default="quarantine",
    show_default=True,
    help="List a bad image and go on, or stop at it.",
)
@click.option(
    "--alpha",
    type=click.Choice(["white", "drop", "mask"]),
    default="white",
    show_default=True,
    help="Lay transparency over white, or drop it; mask: over white, and store where it was as well.",
)
@click.option(
    "--animated",
    type=click.Choice(["first", "skip"]),
    default="first",
    show_default=True,
    help="Of what has several frames take the first, or leave the file out.",
)
@click.option(
    "--hash",
    type=click.Choice(["none", "full"]),
    default="none",
    show_default=True,
    help="How an edited image is told: by size and time, or by its bytes, all of which are read.",
)
@options.source
@click.option("--retry-failed", is_flag=True, help="Try again what failed, whatever the reason was.")
@click.option("--dry-run", is_flag=True, help="Plan, report, and write nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="The first N images only.")
@click.option("--json", "as_json", is_flag=True, help="The report as one JSON document.")
@options.quiet
@click.pass_context
@foreseen
def encode(context: click.Context, src: tuple[str, ...], out: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Encode the images of SRC into the latent store OUT, or go on where a run stopped.

    SRC: a folder, a pattern, or .tar (WebDataset), .parquet or .jsonl files, on this machine or wherever fsspec
    reaches. Any number of these commands may share one OUT.
    """
    from fastvae.data.encoding.encode import encode as run

    report = run(src[0] if len(src) == 1 else src, out, progress=not quiet, **given)
    if as_json:
        echo(report.to_json())
    else:
        for line in report.lines():
            echo(strip_control_characters(line))
    if report.exceeded:
        context.exit(FAILURES)
