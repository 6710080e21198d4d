"""fastvae verify STORE"""

from __future__ import annotations

from dataclasses import asdict

import click

from fastvae.cli import options
from fastvae.cli.output import OTHER, echo, echo_error, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.option("--deep", is_flag=True, help="Also check every row's checksum, values and name.")
@click.option("--rebuild-index", is_flag=True, help="If all is sound, rewrite index.jsonl and failures.jsonl.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@options.quiet
@click.pass_context
@errors_as_sentences
def verify(context: click.Context, store: str, deep: bool, rebuild_index: bool, as_json: bool, quiet: bool) -> None:
    """Check every committed shard of STORE against its record.

    Exit code 1 if one is damaged. Nothing is written, except by --rebuild-index if all is sound.

    \b
    Example:
      fastvae verify latents/ --deep
    """
    from fastvae.data.store.verify import rebuild_index as rebuild
    from fastvae.data.store.verify import verify as look
    from fastvae.system.terminal import format_bytes

    found = look(store, deep=deep, progress=not quiet)
    if rebuild_index and not found.damaged:
        rebuild(store)
        found.stale = []
    elif rebuild_index:
        echo_error("fastvae: index.jsonl and failures.jsonl were not rewritten: the store is damaged, repair it first")
    if as_json:
        echo_json({"store": store, "deep": deep, "pending": found.pending, **asdict(found)})
    else:
        for damage in found.damaged:
            echo(strip_control_characters(f"damaged {damage.file} {damage.what}"))
        for name in found.stale:
            echo(f"stale   {name} is missing or says something else than the records: the next encode rewrites it")
        rows = f"{found.rows} rows" + (f" ({found.superseded} superseded)" if found.superseded else "")
        word = "damaged" if found.damaged else "sound"
        echo(
            f"{word:7s} {found.committed} of {found.planned} units, {rows}, {found.failed} quarantined, "
            f"{format_bytes(found.bytes)}; {len(found.damaged)} damaged, {found.pending} to do"
        )
    if found.damaged:
        context.exit(OTHER)
