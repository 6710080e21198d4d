"""fastvae repair STORE"""

from __future__ import annotations

import click

from fastvae.cli.output import echo, echo_json, foreseen, printable


@click.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@foreseen
def repair(store: str, as_json: bool) -> None:
    """Take back the commit records of damaged shards of STORE, so that the same encode does these again, and no others.

    What is damaged is what verify --deep finds. Exit code 5 while a run is writing the store.
    """
    from fastvae.data.verify import verify, withdraw

    found = verify(store, deep=True)
    units = withdraw(store, found)
    if as_json:
        echo_json({"store": store, "withdrawn": units, "damaged": [damage.file for damage in found.damaged]})
        return
    for damage in found.damaged:
        echo(printable(f"damaged {damage.file} {damage.what}"))
    advice = ": run the same fastvae encode again, which does these and no others" if units else ""
    echo(f"done    {len(units)} units taken back{advice}")
