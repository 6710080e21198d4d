"""fastvae demo [OUT]"""

from __future__ import annotations

from pathlib import Path

import click

from fastvae.cli.output import echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("out", type=click.Path(file_okay=False), default="fastvae-demo")
@click.option("--vae", default="tiny", show_default=True, help='A directory, a Hub id, or "tiny", which is built in.')
@click.option("--json", "as_json", is_flag=True, help="Print the figures as one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Print no plan and no progress bar.")
@errors_as_sentences
def demo(out: str, vae: str, as_json: bool, quiet: bool) -> None:
    """Encode photographs to latents in OUT, and decode them.

    \b
    Example:
      fastvae demo fastvae-demo/
    """
    from fastvae.data.decoding.demo import demonstrate

    result = demonstrate(Path(out), vae=vae, progress=not quiet)
    if as_json:
        echo_json(result.facts())
        return
    for key, decibels in sorted(result.psnr.items()):
        echo(strip_control_characters(f"{key:24s} PSNR {decibels:5.2f} dB"))
    echo(f"{'mean':24s} PSNR {result.mean_psnr:5.2f} dB")
    if result.encode.ok:
        echo(f"encoded at {result.encode.images_per_second:.2f} images/s ({result.encode.dtype}, 256x256)")
    else:
        echo(f"nothing to encode: {result.encode.resumed} rows were there from an earlier run")
    echo(strip_control_characters(f"latents  {result.store}\npictures {result.sheet}"))
