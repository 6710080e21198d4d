"""The text of --help: whole lines, examples that can be run, and the exit codes at the end."""

import re
import shlex

import pytest
from click.testing import CliRunner

from fastvae.cli import output
from fastvae.cli.main import cli


def shown(*arguments, width=80):
    result = CliRunner().invoke(cli, [*arguments, "--help"], terminal_width=width)
    assert result.exit_code == 0, result.output
    return result.output


def examples(text):
    return [shlex.split(line)[1:] for line in text.splitlines() if re.match(r"    fastvae ", line)]


@pytest.mark.parametrize("width", [50, 80, 200])
def test_the_help_has_a_whole_sentence_for_each_verb(width):
    text = shown(width=width)
    assert "..." not in text.partition("\n")[2]
    joined = " ".join(text.split())
    for name, verb in cli.commands.items():
        sentence = verb.help.splitlines()[0]
        assert sentence.endswith(".")
        assert f" {name} {sentence} " in joined
        assert width < 80 or f"  {name:13}  {sentence}\n" in text


def test_three_examples_come_first_and_the_exit_codes_last():
    text = shown()
    places = [text.index(part) for part in ("Examples:", "Options:", "Commands:", "Exit codes:")]
    assert places == sorted(places)
    assert [words[0] for words in examples(text)] == ["demo", "encode", "decode"]
    assert len(re.findall(r"^\S.*:$", text[places[-1] :], flags=re.MULTILINE)) == 1  # no other section follows
    codes = {getattr(output, name) for name in output.__dict__ if name.isupper() and name != "DEBUG"}
    listed = re.findall(r"^  (\d+) +\S", text[places[-1] :], flags=re.MULTILINE)
    assert [int(code) for code in listed] == sorted({0, *codes})


@pytest.mark.parametrize("verb", [None, *cli.commands])
def test_each_example_is_a_command_that_parses(verb, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photographs", "latents"):
        (tmp_path / folder).mkdir()
    (tmp_path / "photo.jpg").touch()
    found = examples(shown(*[verb] * bool(verb)))
    assert verb is None or [words[0] for words in found] == [verb]
    for name, *arguments in found:
        cli.commands[name].make_context(name, arguments)


@pytest.mark.parametrize("verb", [None, *cli.commands])
def test_no_help_runs_past_the_edge_of_a_terminal(verb):
    assert max(map(len, shown(*[verb] * bool(verb)).splitlines())) <= 80
