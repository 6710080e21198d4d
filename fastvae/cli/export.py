"""fastvae export STORE DST"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters

# Files that several images would share, whose images are named.
NAMED_CLASHES = 10


@click.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.argument("dst", type=click.Path())
@click.option(
    "--to",
    type=click.Choice(["npz-kohya", "wds", "parquet", "hf"]),
    required=True,
    help="sd-scripts caches, WebDataset tars, Parquet files, or a folder for datasets.load_dataset.",
)
@click.option(
    "--posterior",
    type=click.Choice(["dist", "mean", "sample"]),
    help="Mean and log-variance, the mean alone, or one draw. Default: dist; for npz-kohya: sample.",
)
@click.option(
    "--scaled", is_flag=True, help="Scale the latents as the denoiser takes them, in fp32. Default: raw, as stored."
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of --posterior sample.")
@click.option(
    "--family",
    type=click.Choice(["sd", "sdxl", "sd3", "flux"]),
    help="For npz-kohya: the model family, which decides file names and scaling. Default: from the store's scaling.",
)
@click.option(
    "--beside-images",
    is_flag=True,
    help="For npz-kohya: DST is the folder of the images, and each file goes beside its image.",
)
@click.option("--shard-mb", type=float, default=256, show_default=True, help="Size of a tar or Parquet file in MB.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@options.quiet
@errors_as_sentences
def export(store: str, dst: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Write the rows of STORE into DST, for another trainer.

    DST is a new folder, which appears complete or not at all; with --beside-images it is the folder of the images.

    \b
    Example:
      fastvae export latents/ caches/ --to npz-kohya
    """
    from fastvae.data.exporting.export import export as run
    from fastvae.system.terminal import format_bytes

    done = run(store, dst, progress=not quiet, **given)
    if as_json:
        echo_json(asdict(done))
    else:
        what = f"{done.about['posterior']}, {done.about['space']}"
        rest = f"; {done.pending} rows are planned and not committed: fastvae verify says why" if done.pending else ""
        for keys in done.clashes[:NAMED_CLASHES]:
            echo(strip_control_characters(f"clash   {', '.join(keys)} would share a file: none is written, rename one"))
        if len(done.clashes) > NAMED_CLASHES:
            echo(f"clash   {len(done.clashes) - NAMED_CLASHES} more files: --json names their images")
        files = f"{done.files} files, {format_bytes(done.bytes)}"
        echo(strip_control_characters(f"done    {done.rows} rows ({what}) in {files}: {done.path}{rest}"))
