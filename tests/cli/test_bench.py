"""fastvae bench as a user runs it: its output, its exit codes, and arguments refused before anything is measured."""

import json
import sys

import pytest
from click.testing import CliRunner
from support.small_store import small_vae

from fastvae.cli.main import cli
from fastvae.report import benchmark as module
from fastvae.report import contestants


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_vae().save_pretrained(folder)
    return str(folder)


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def bench(model, *more, code=0):
    fast = ["--size", 16, "--dtype", "fp32", "--device", "cpu", "--seconds", 0]
    return run("--vae", model, *fast, *more, code=code)


def test_the_table_on_stdout_and_the_progress_on_stderr(model, tmp_path):
    result = bench(model, "--html", tmp_path / "report.html", "--json", tmp_path / "report.json")
    lines = result.stdout.splitlines()
    assert [line.split(",")[0] for line in lines[::4]] == ["encode 1 x 16x16", "decode 1 x 16x16"]
    assert lines[0] == "encode 1 x 16x16, fp32 on cpu, medians of 6 rounds"
    assert lines[1].split() == ["images/s", "ms", "95", "%", "interval", "x", "diffusers", "MB", "error"]
    for line, name in zip(lines[2:4], ("fastvae", "diffusers"), strict=True):
        words = line.split()
        assert words[0] == name
        assert words[4] == "to"
        assert words[-3:-1] == ["not", "measured"]
    said = result.stderr.splitlines()
    assert said[0] == f"bench   {model}  cpu  fp32  encode 1 x 16x16, decode 1 x 16x16"
    assert said[-1] == "measure decode 1 x 16x16: fastvae, diffusers in turns"
    kept = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert [case["task"] for case in kept["cases"]] == ["encode", "decode"]
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>")
    assert kept["versions"]["torch"] in page


def test_json_alone_is_one_document_on_stdout_and_quiet_is_quiet(model):
    result = bench(model, "--task", "encode", "--batch", 1, "--batch", 2, "-q", "--json")
    told = json.loads(result.stdout, parse_constant=pytest.fail)
    assert [case["batch"] for case in told["cases"]] == [1, 2]
    assert result.stderr == ""


def test_a_wrong_result_is_shown_written_and_exit_code_1(model, tmp_path, monkeypatch):
    def broken(vae):
        vae.encoder.conv_out.weight.mul_(2)
        return vae

    monkeypatch.setattr(contestants, "accelerate", broken)
    monkeypatch.setattr(module, "explained", lambda *arguments: [])
    result = bench(model, "--task", "encode", "--html", tmp_path / "report.html", code=1)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("  fastvae "))
    assert "wrong: its largest error is " in line
    assert "wrong: its largest error is " in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_nothing_is_measured_for_a_page(missing, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(module, "benchmark", lambda **options: pytest.fail("it was measured"))
    result = run("--vae", "tiny", "--html", tmp_path / "report.html", code=1)
    assert result.stderr == f"fastvae: the HTML report needs {missing}: pip install jinja2 matplotlib\n"


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        (["--size", "100"], "fastvae: size must be a multiple of the model's 8 pixels per latent, got 100", 2),
        (["--size", "0"], "0 is not in the range x>=1", 2),
        (["--dtype", "int8"], "'int8' is not one of 'fp32', 'bf16', 'fp16'", 2),
        (["--device", "gpu"], "fastvae: device must be one of this machine's, such as 'cpu' or 'cuda:0', got 'gpu'", 2),
        (["--html", "{there}/no/report.html"], "fastvae: html must be a file in a folder that is there, got", 2),
        (["--json", "{there}/no/report.json"], "fastvae: json must be a file in a folder that is there, got", 2),
        (["--html", "{there}"], "is a directory", 2),
        (["--vae", "{there}"], "fastvae: {there}", 1),
        (["--vae", "no/such-model"], "fastvae: no/such-model/config.json: no such file", 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_argument_is_one_sentence(arguments, words, code, tmp_path):
    arguments = [argument.replace("{there}", str(tmp_path)) for argument in arguments]
    if "--vae" not in arguments:
        arguments += ["--vae", "tiny"]
    result = run(*arguments, code=code)
    assert words.replace("{there}", str(tmp_path)) in " ".join(result.stderr.replace("│", " ").split())
    assert result.stdout == ""
