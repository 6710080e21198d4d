"""Single files as models on the command line, with --preset."""

import json

import pytest
from click.testing import CliRunner
from safetensors.torch import save_file
from support.small_store import small_vae, write_pictures

from fastvae.checkpoints import presets
from fastvae.cli.main import cli

SCALING = 0.25


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A single file of a small model, and a preset for it."""
    config = dict(small_vae(scaling_factor=SCALING).config)
    preset = presets.Preset("small", "AutoencoderKL", "a model of tests", config, "tests")
    monkeypatch.setitem(presets.PRESETS, "small", preset)
    path = tmp_path / "ae.safetensors"
    save_file(small_vae().state_dict(), path)
    return path


def run(*command, code=0):
    done = CliRunner().invoke(cli, [str(part) for part in command])
    assert done.exit_code == code, done.output
    return done


def test_a_single_file_encodes_decodes_and_repairs(file, tmp_path):
    write_pictures(tmp_path / "in", 2)
    options = ("--buckets", 32, "--device", "cpu", "--dtype", "fp32", "--json")
    encode = ("encode", tmp_path / "in", tmp_path / "out", "--vae", file, *options)
    assert json.loads(run(*encode, "--preset", "small").stdout)["ok"] == 2
    stored = json.loads((tmp_path / "out" / "store.json").read_text())
    assert (stored["source"]["vae"], stored["source"]["preset"]) == (str(file), "small")
    assert stored["scaling"]["scaling_factor"] == SCALING
    assert "small" in run("decode", tmp_path / "out", tmp_path / "png", "--device", "cpu").stderr
    next(path for path in (tmp_path / "out" / "shards").iterdir() if path.suffix != ".json").unlink()
    repaired = run("repair", tmp_path / "out", tmp_path / "in", "--device", "cpu", "--json").stdout
    assert json.loads(repaired)["report"]["ok"] == 2
    refused = run(*encode, code=2)
    assert "fits no preset" in refused.stderr


def test_info_of_a_single_file(file, tmp_path):
    facts = json.loads(run("info", file, "--preset", "small", "--json").stdout)
    assert (facts["class"], facts["scaling"]["scaling_factor"]) == ("AutoencoderKL", SCALING)
    assert "there is no 'smal' (did you mean 'small'?)" in run("info", file, "--preset", "smal", code=2).stderr
    assert "no such file" in run("info", tmp_path / "other.safetensors", code=1).stderr
    save_file({"x": next(small_vae().parameters()).detach()}, tmp_path / "other.safetensors")
    assert "holds no VAE" in run("info", tmp_path / "other.safetensors", code=2).stderr


def test_a_single_file_in_bench_compare_and_doctor(file, tmp_path, monkeypatch):
    monkeypatch.setattr("fastvae.report.compare.check_pictures", lambda multiple: {})
    monkeypatch.setattr("fastvae.report.contestants.diffusers_twin", lambda plain: (None, "left out"))  # a slow import
    write_pictures(tmp_path / "in", 1)
    fast = ("--dtype", "fp32", "--device", "cpu", "--json")
    commands = {
        "bench": ("bench", "--vae", file, "--size", 16, "--seconds", 0, "--task", "encode", *fast),
        "compare": ("compare", tmp_path / "in" / "000.png", "--vae", file, *fast),
        "doctor": ("doctor", tmp_path, "--vae", file, "--json"),
    }
    told = {name: json.loads(run(*command, "--preset", "small").stdout) for name, command in commands.items()}
    assert told["bench"]["model"]["source"] == str(file)
    assert told["compare"]["vae"] == f"{file} (weights: read from the model's file)"
    assert told["compare"]["is_right"]
    facts = {finding["name"]: finding["facts"] for finding in told["doctor"]["findings"]}
    assert facts["model"]["scaling"]["scaling_factor"] == SCALING
    for name, command in commands.items():
        done = run(*command, code={"bench": 2, "compare": 2, "doctor": 1}[name])
        assert "fits no preset" in done.output
        done = run(*command, "--preset", "smal", code={"bench": 2, "compare": 2, "doctor": 1}[name])
        assert "did you mean 'small'?" in done.output


def test_a_preset_of_a_model_with_a_config_is_refused(tmp_path):
    small_vae().save_pretrained(tmp_path / "model")
    assert "preset must be left out, got 'sdxl'" in run("info", tmp_path / "model", "--preset", "sdxl", code=2).stderr


def test_a_single_file_in_tune(file):
    """By a size that it does not take, which is refused after the model was loaded and before anything is measured."""
    tune = ("tune", "--vae", file, "--size", 12, "--device", "cpu", "--dtype", "fp32")
    assert (
        "sizes must be multiples of the model's 8 pixels per latent" in run(*tune, "--preset", "small", code=2).stderr
    )
    assert "did you mean 'small'?" in run(*tune, "--preset", "smal", code=2).stderr
    assert "fits no preset" in run(*tune, code=2).stderr
