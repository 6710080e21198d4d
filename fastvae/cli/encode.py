"""fastvae encode SRC OUT"""

from __future__ import annotations

from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import FAILURES, echo, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("paths", metavar="SRC... OUT", nargs=-1, type=click.Path())
@options.vae
@options.model_location
@options.preset
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
    help="Part of the scaled image that is kept.",
)
@click.option("--variants", type=click.IntRange(min=1), default=1, show_default=True, help="Random crops per image.")
@click.option("--flip", is_flag=True, help="Also encode each crop mirrored.")
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of random crops and of --posterior sample.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Default: the store's, else by device.")
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
    help="Format of stored log-variances.",
)
@click.option(
    "--store-dtype",
    type=click.Choice(["fp16", "fp32"]),
    default="fp16",
    show_default=True,
    help="Format of stored means.",
)
@options.run
@click.option(
    "--shard-mb",
    type=float,
    default=256,
    show_default=True,
    help="Size of a shard in MB; a kill loses the work of two at most.",
)
@click.option(
    "--commit-seconds",
    type=click.FloatRange(min=0),
    default=60,
    show_default=True,
    help="Commit a shard that takes longer, its other rows as another shard; 0: never.",
)
@click.option(
    "--on-error",
    type=click.Choice(["quarantine", "fail"]),
    default="quarantine",
    show_default=True,
    help="For a bad image: list it and continue, or stop.",
)
@click.option(
    "--alpha",
    type=click.Choice(["white", "drop", "mask"]),
    default="white",
    show_default=True,
    help="Composite transparency over white, drop it, or mask: over white, and store the opacity too.",
)
@click.option(
    "--animated",
    type=click.Choice(["first", "skip"]),
    default="first",
    show_default=True,
    help="For a file of several frames: encode the first, or skip the file.",
)
@click.option(
    "--hash",
    type=click.Choice(["none", "full"]),
    default="none",
    show_default=True,
    help="Find edited images by size and time, or by a hash of all bytes.",
)
@options.source
@click.option(
    "--min-size",
    type=click.IntRange(min=0),
    default=0,
    help="Leave out images with a side under so many pixels.",
)
@click.option("--no-upscale", is_flag=True, help="Leave out images that are smaller than their bucket.")
@click.option("--exclude", multiple=True, help="Leave out images by a pattern, such as '*-masklabel.*'; repeatable.")
@click.option("--retry-failed", is_flag=True, help="Try again every image that failed before, whatever the reason.")
@click.option(
    "--captions",
    type=click.Choice(["beside", "none"]),
    default="beside",
    show_default=True,
    help="Record captions beside the images of a folder (.txt, .caption, metadata.jsonl and so on), or leave them.",
)
@click.option("--prune", is_flag=True, help="Serve no row any more whose image the source no longer has.")
@click.option("--dry-run", is_flag=True, help="Plan and report, but write nothing.")
@click.option("--limit", type=click.IntRange(min=1), help="Encode the first N images only.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON document.")
@options.quiet
@click.pass_context
@errors_as_sentences
def encode(context: click.Context, paths: tuple[str, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Encode the images of SRC into the store OUT, or resume it.

    SRC: folders and patterns, or .tar (WebDataset), .parquet or .jsonl files, local or under a URL that fsspec knows.
    Any number of these commands may share one OUT. The same command resumes a run that stopped.

    \b
    Example:
      fastvae encode photographs/ latents/ --vae stabilityai/sdxl-vae
    """
    if len(paths) < 2:
        got = f"only {paths[0]!r}" if paths else "neither"
        raise click.UsageError(f"SRC, the images, and OUT, the folder of the store, must be named, got {got}")
    *src, out = paths
    if not out:  # of a shell's variable that is not set; as a path it would be this folder
        raise click.UsageError("OUT must be the folder of the store, got an empty name")
    click.Path(file_okay=False).convert(out, None, context)
    from fastvae.data.encoding.encode import encode as run
    from fastvae.data.encoding.report import Interrupted

    try:
        report = run(src[0] if len(src) == 1 else tuple(src), out, progress=not quiet, **given)
    except Interrupted as stopped:
        if as_json:
            echo(stopped.report.to_json())
        raise
    if as_json:
        echo(report.to_json())
    else:
        for line in report.lines():
            echo(strip_control_characters(line))
    if report.exceeded:
        context.exit(FAILURES)
