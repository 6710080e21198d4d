"""The tables of parameters in docs/latents.md are the signatures and the options of the command line."""

import inspect
import re
from pathlib import Path

import click
import pytest

import fastvae
from fastvae.cli.main import cli

PAGE = (Path(__file__).parents[2] / "docs" / "latents.md").read_text()
COMMANDS = ["encode", "repair"]
# Given to the command as arguments, and a flag of the opposite meaning.
ARGUMENTS, QUIET = {"src", "out", "store"}, "progress"
# Options of the command alone.
OF_THE_COMMAND = {"help", "as_json", "quiet"}


def rows(command):
    """Return parameter -> (flag, default) of a command's table."""
    table = re.split(r"\n#+ ", PAGE.split(f"### Parameters of {command}\n")[1])[0]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines() if line.startswith("| `")]
    return {name.strip("| `"): (flag, default) for name, flag, default, *_ in cells}


def options_of(command):
    """Return parameter -> option of a command, without its arguments."""
    return {option.name: option for option in cli.commands[command].params if isinstance(option, click.Option)}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_has_every_parameter_with_its_default(command):
    signature = inspect.signature(getattr(fastvae, command)).parameters
    given = {
        name: "required" if parameter.default is inspect.Parameter.empty else repr(parameter.default).replace("'", '"')
        for name, parameter in signature.items()
    }
    assert {name: default.strip("`") for name, (_, default) in rows(command).items()} == given


@pytest.mark.parametrize("command", COMMANDS)
def test_a_table_has_every_option(command):
    options = options_of(command)
    flags = {name: flag for name, (flag, _) in rows(command).items() if name not in ARGUMENTS}
    assert flags.pop(QUIET) == "`-q`, `--quiet` turns it off"
    assert flags == {
        name: f"`{option.opts[0]}`" + ", repeatable" * option.multiple
        for name, option in options.items()
        if name not in OF_THE_COMMAND
    }


@pytest.mark.parametrize(("command", "words"), [("encode", ["src", "out", "--vae", "tiny"]), ("repair", ["store"])])
def test_an_option_has_the_default_of_its_parameter(command, words):
    signature = inspect.signature(getattr(fastvae, command)).parameters
    given = cli.commands[command].make_context(command, words).params
    for name in options_of(command).keys() - OF_THE_COMMAND:
        default = signature[name].default
        if default is not inspect.Parameter.empty:
            assert given[name] in (default, str(default)), name
