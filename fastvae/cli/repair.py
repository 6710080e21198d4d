"""fastvae repair STORE [SRC]"""

from __future__ import annotations

from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import FAILURES, echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("store", type=click.Path(file_okay=False))
@click.argument("src", nargs=-1)
@click.option("--vae", help="A directory, a Hub id, a single file, or tiny. Default: the model that the store names.")
@options.model_location
@options.preset
@click.option("--retry-failed", is_flag=True, help="Try again every image that failed before, whatever the reason.")
@options.device
@options.run
@options.source
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@options.quiet
@click.pass_context
@errors_as_sentences
def repair(context: click.Context, store: str, src: tuple[str, ...], as_json: bool, quiet: bool, **given: Any) -> None:
    """Encode damaged units of STORE again from images of SRC.

    Damaged are those that verify --deep finds. Settings and model are those that the store names. SRC is the source of
    the first run; it may be left out if nothing is damaged. Exit code 5 while a run is writing the store.

    \b
    Example:
      fastvae repair latents/ photographs/
    """
    from fastvae.data.encoding.repair import repair as run
    from fastvae.data.encoding.report import Interrupted

    try:
        done = run(store, src[0] if len(src) == 1 else src or None, progress=not quiet, **given)
    except Interrupted as stopped:
        if as_json:
            echo_json(stopped.report.facts())
        raise
    report = done.report
    if as_json:
        echo_json(done.facts())
    else:
        for damage in done.damaged:
            echo(strip_control_characters(f"damaged {damage.file} {damage.what}"))
        for line in report.lines() if report else []:
            echo(strip_control_characters(line))
        rest = f", {done.missing} not found in the source" if done.missing else ""
        rest += f"; {done.pending} to do by fastvae encode" if done.pending else ""
        echo(f"repair  {len(done.units)} damaged units done again, {done.retried} failed images tried again{rest}")
    if report and report.exceeded:
        context.exit(FAILURES)
