"""fastvae info STORE|MODEL"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastvae.cli import options
from fastvae.cli.output import echo, echo_json, errors_as_sentences
from fastvae.system.terminal import strip_control_characters


@click.command()
@click.argument("what", metavar="STORE|MODEL")
@options.model_location
@options.preset
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@options.quiet
@errors_as_sentences
def info(
    what: str, subfolder: str | None, revision: str | None, preset: str | None, as_json: bool, quiet: bool
) -> None:
    """Print the contents of a store, or the facts of a model.

    \b
    Example:
      fastvae info latents/
    """
    from fastvae.data.store.layout import STORE
    from fastvae.system.terminal import print_stderr

    is_store = (Path(what) / STORE).exists()
    if not quiet:
        print_stderr(f"info    {'latent store' if is_store else 'model'} {what}\n")
    if is_store:
        from fastvae.data.store.info import store_facts

        facts = store_facts(what)
    else:
        from fastvae.data.encoding.model import model_facts

        try:
            facts = model_facts(what, subfolder, revision, preset)
        except FileNotFoundError as error:
            if Path(what).is_dir() and not Path(what, subfolder or "", "config.json").exists():
                raise FileNotFoundError(f"{what} is no store and no model: no store.json and no config.json") from error
            raise
    if as_json:
        echo_json(facts)
        return
    for line in _lines(facts):
        echo(strip_control_characters(line))


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:{24 - len(indent)}s} {value}")
    return lines
