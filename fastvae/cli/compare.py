"""fastvae compare IMAGE..."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import OTHER, echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False))
@options.vae
@options.model_location
@options.preset
@options.dtype
@options.device
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True),
    help="Write the table as one HTML file without external resources.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of the table.")
@options.quiet
@click.pass_context
@errors_as_sentences
def compare(
    context: click.Context, images: tuple[str, ...], html: str | None, as_json: bool, quiet: bool, **given: Any
) -> None:
    """Compare the fast path with eager torch, stage by stage.

    Images are cropped to a multiple of the model's pixels and not resized: float64 is slow. The exit code is 1 if a
    stage differs from float64 by more than twice eager's error plus one rounding.

    \b
    Example:
      fastvae compare photo.jpg --vae stabilityai/sdxl-vae
    """
    if html is not None and not Path(html).absolute().parent.is_dir():
        raise ValueError(f"html must be a file in a folder that is there, got {html!r}")
    if html is not None:
        from fastvae.report.page import check_extra

        check_extra()  # before a minute of computing
    from fastvae.checkpoints.loading import full_name
    from fastvae.report.compare import compare_files
    from fastvae.system.terminal import print_stderr

    def say(line: str) -> None:
        if not quiet:
            print_stderr(f"{line}\n")

    say(f"compare {len(images)} images  {full_name(given['vae'])}  against eager and float64")
    source, found = compare_files(images, say=say, **given)
    if as_json:
        echo_json({"vae": source, **found.facts()})
    else:
        echo(strip_control_characters(f"{source}: {found}"))
    if html is not None:
        from fastvae.report.page import comparison_page

        Path(html).write_text(comparison_page(source, found), encoding="utf-8")
    if not found.is_right:
        context.exit(OTHER)
