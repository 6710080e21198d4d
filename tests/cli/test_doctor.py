"""fastvae doctor as a user runs it."""

import json
import time

import pytest
from click.testing import CliRunner

from fastvae.cli.main import cli
from fastvae.report import doctor
from fastvae.report.findings import Finding

NAMES = ["versions", "install", "gpu", "kernels", "model", "numbers", "paths", "forms", "images", "disk"]


def test_the_whole_examination(forks, tmp_path):
    """In another process, without Triton's interpreter, which the tests run under."""
    began = time.monotonic()
    done = forks.fastvae("doctor", tmp_path, "--json", "-q")
    told = json.loads(done.stdout, parse_constant=pytest.fail)
    assert done.stderr == ""
    assert [finding["name"] for finding in told["findings"]] == NAMES
    assert told["ok"] == all(finding["state"] != "bad" for finding in told["findings"])
    assert done.returncode == (0 if told["ok"] else 1)
    by_name = {finding["name"]: finding for finding in told["findings"]}
    assert by_name["versions"]["state"] == by_name["numbers"]["state"] == by_name["images"]["state"] == "ok"
    for task in ("encode", "decode"):
        found = by_name["numbers"]["facts"][task]
        assert found["error"] <= found["allowed_error"]
    assert by_name["model"]["facts"]["vae"] == "tiny"
    assert by_name["disk"]["facts"]["folder"] == str(tmp_path)
    assert by_name["paths"]["facts"]["blocks"]
    assert not list(tmp_path.iterdir())
    assert time.monotonic() - began < 120  # it waits for nothing; on a quiet machine it takes five seconds


def findings(*states):
    return lambda *arguments, **options: iter(
        Finding(f"name{number}", state, f"sentence \x1b{number}") for number, state in enumerate(states)
    )


@pytest.mark.parametrize(
    ("states", "last", "code"),
    [
        (["ok", "ok"], "nothing is bad, no notes", 0),
        (["ok", "note"], "nothing is bad, 1 note", 0),
        (["bad", "note", "note"], "1 is bad, 2 notes", 1),
        (["bad", "ok", "bad"], "2 are bad, no notes", 1),
    ],
)
def test_a_line_each_and_the_code_of_the_worst(states, last, code, monkeypatch):
    monkeypatch.setattr(doctor, "examine", findings(*states))
    result = CliRunner().invoke(cli, ["doctor", "-q"])
    lines = result.stdout.splitlines()
    assert lines[:-1] == [f"{state:5}name{i:<5} sentence ?{i}" for i, state in enumerate(states)]
    assert (lines[-1], result.exit_code) == (last, code)
    assert result.stderr == ""
    told = json.loads(CliRunner().invoke(cli, ["doctor", "--json"]).stdout)
    assert told["ok"] == (code == 0)
    assert [finding["state"] for finding in told["findings"]] == states


def test_the_options_reach_the_examination(monkeypatch):
    given = []

    def examine(*arguments, **options):
        given.append((arguments, options))
        return iter(())

    monkeypatch.setattr(doctor, "examine", examine)
    options = ["--vae", "some/model", "--subfolder", "vae", "--revision", "main", "--preset", "sdxl"]
    assert CliRunner().invoke(cli, ["doctor", "latents", *options]).exit_code == 0
    assert given == [(("some/model", "latents"), {"subfolder": "vae", "revision": "main", "preset": "sdxl"})]
