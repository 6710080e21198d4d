"""fastvae decode STORE OUT"""

from __future__ import annotations

import warnings
from typing import Any

import click

from fastvae.cli.output import complain, echo, echo_json, foreseen, printable


@click.command()
@click.argument("store", type=click.Path(exists=True, file_okay=False))
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--rows", default="0:16", show_default=True, help="Which rows, as in 0:16.")
@click.option("--vae", help="A directory, a Hub id, or tiny. Default: what the store was made with.")
@click.option("--subfolder", help="Where the VAE is inside that directory or repository.")
@click.option("--revision", help="A branch, tag or commit of the Hub repository.")
@click.option("--device", help="As torch names it: cpu, cuda, cuda:1. Default: the first GPU, else the CPU.")
@click.option("--sheet", type=click.Path(dir_okay=False), help="A PNG file for all of them at a glance.")
@click.option("--json", "as_json", is_flag=True, help="The list of files as one JSON document.")
@foreseen
def decode(store: str, out: str, rows: str, as_json: bool, **options: Any) -> None:
    """Decode rows of the latent store STORE into PNG files in OUT."""
    from fastvae.data.decode import decode as run
    from fastvae.data.decode import parse_rows

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        written = run(store, out, rows=parse_rows(rows), **options)
    for warning in caught:
        complain(printable(f"fastvae: {warning.message}"))
    if as_json:
        echo_json({"files": [{"key": key, "file": str(path)} for key, path in written]})
    else:
        for key, path in written:
            echo(printable(f"{path}  {key}"))
