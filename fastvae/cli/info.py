"""fastvae info STORE|MODEL"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fastvae.cli.output import echo, echo_json, foreseen, printable


@click.command()
@click.argument("what", metavar="STORE|MODEL")
@click.option("--subfolder", help="Where the VAE is inside a model's directory or repository.")
@click.option("--revision", help="A branch, tag or commit of the Hub repository.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@foreseen
def info(what: str, subfolder: str | None, revision: str | None, as_json: bool) -> None:
    """What a latent store holds, or what a model is."""
    if (Path(what) / "store.json").exists():
        from fastvae.data.facts import store_facts

        facts = store_facts(what)
    else:
        from fastvae.data.facts import model_facts

        facts = model_facts(what, subfolder, revision)
    if as_json:
        echo_json(facts)
        return
    for line in _lines(facts):
        echo(printable(line))


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:{24 - len(indent)}s} {value}")
    return lines
