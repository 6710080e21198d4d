"""fastvae decode STORE OUT"""

from __future__ import annotations

import warnings
from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import echo, echo_error, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--rows", default="0:16", show_default=True, help="Rows to decode, as in 0:16.")
@click.option("--vae", help="A directory, a Hub id, a single file, or tiny. Default: the model that the store names.")
@options.model_location
@options.preset
@options.device
@click.option("--sheet", type=click.Path(dir_okay=False), help="Also write a contact sheet to this PNG file.")
@click.option("--json", "as_json", is_flag=True, help="Print the list of files as one JSON document.")
@options.quiet
@errors_as_sentences
def decode(store: str, out: str, rows: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Decode rows of the latent store STORE into PNG files in OUT.

    \b
    Example:
      fastvae decode latents/ pictures/ --rows 0:16
    """
    from fastvae.data.decoding.decode import decode as run
    from fastvae.data.decoding.decode import parse_rows

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = run(store, out, rows=parse_rows(rows), progress=not quiet, **given)
    for warning in caught:
        echo_error(strip_control_characters(f"fastvae: {warning.message}"))
    if as_json:
        echo_json({"files": [{"key": key, "file": str(path)} for key, path in written]})
    else:
        for key, path in written:
            echo(strip_control_characters(f"{path}  {key}"))
