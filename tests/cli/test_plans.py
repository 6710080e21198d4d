"""The plan line that every verb prints on stderr first; none with --quiet."""

import re

import pytest
from click.testing import CliRunner
from support.small_store import SIDE, picture, write_pictures, write_store

from fastvae.checkpoints.presets import PRESETS, matching
from fastvae.cli.main import cli
from fastvae.system.terminal import format_bytes

SIZE = r"\d+\.\d [KMG]iB"
PLANS = {
    "encode": rf"encode  {{model}}  fp32  dist  bucket 32x32  3 images  ~{SIZE} \(free {SIZE}\)  .*",
    "verify": rf"verify  {{store}}  2 of 2 units, 5 rows, {SIZE}: hashes",
    "repair": rf"verify  {{store}}  2 of 2 units, 5 rows, {SIZE}: hashes, rows and values",
    "decode": rf"decode  {{store}}  2 of 5 rows  at most 6\.0 KiB \(free {SIZE}\)",
    "export": rf"export  {{store}}  5 rows  wds  dist  raw  ~{SIZE} \(free {SIZE}\)",
    "info": r"info    latent store {store}",
    "compare": r"compare 1 images  {model}  against eager and float64",
    "doctor": rf"doctor  {{model}}  for latents in {{new}} \(free {SIZE}\)",
    "bench": r"bench   .*",
    "tune": r"tune    {model}  cpu-.*  fp32  32 pixels",
}


@pytest.mark.parametrize("verb", PLANS)
def test_a_verb_prints_its_plan_first_and_not_with_quiet(tmp_path, model, verb, monkeypatch):
    monkeypatch.setattr("fastvae.report.tuning.network.SIZES", (16,))
    monkeypatch.setattr("fastvae.report.tuning.measure.interleaved", lambda calls, *_: dict.fromkeys(calls, [1.0] * 6))
    write_pictures(tmp_path / "in", 3)
    picture(1, 32, 32).save(tmp_path / "one.png")
    store, new = write_store(tmp_path / "store", {(32, 32): list("abcde")}), tmp_path / "new"
    rest = {
        "encode": [tmp_path / "in", new, "--vae", model, "--buckets", SIDE, "--dtype", "fp32", "--device", "cpu"],
        "verify": [store],
        "repair": [store],
        "decode": [store, new, "--rows", "0:2", "--vae", model, "--device", "cpu"],
        "export": [store, new, "--to", "wds"],
        "info": [store],
        "compare": [tmp_path / "one.png", "--vae", model, "--dtype", "fp32", "--device", "cpu"],
        "doctor": [new, "--vae", model],
        "bench": ["--vae", model, "--size", 32, "--seconds", 0, "--task", "encode", "--device", "cpu"],
        "tune": ["--vae", model, "--size", 32, "--dtype", "fp32", "--device", "cpu"],
    }[verb]
    places = {"model": re.escape(model), "store": re.escape(str(store)), "new": re.escape(str(new))}
    said = CliRunner().invoke(cli, [verb, *map(str, rest)])
    assert said.exit_code in (0, 1), said.output
    assert re.fullmatch(PLANS[verb].format(**places), said.stderr.splitlines()[0])
    if verb == "export":
        rest[1] = tmp_path / "again"
    quiet = CliRunner().invoke(cli, [verb, *map(str, rest), "-q"])
    assert quiet.exit_code == said.exit_code
    assert "another model than the one" in quiet.stderr if verb == "decode" else quiet.stderr == ""


@pytest.mark.parametrize("verb", ["encode", "bench", "tune", "compare"])
def test_the_tiny_model_is_said_to_be_for_trying_things_out(tmp_path, monkeypatch, verb):
    def stop(*arguments, **options):
        raise ValueError("the plan was printed")

    monkeypatch.setattr("fastvae.data.encoding.run.encode_units", stop)
    monkeypatch.setattr("fastvae.report.benchmark.contestants_for", stop)
    monkeypatch.setattr("fastvae.report.compare.compare_files", stop)
    monkeypatch.setattr("fastvae.report.tuning.tune.convolutions_to_tune", stop)
    write_pictures(tmp_path / "in", 1)
    rest = {
        "encode": [tmp_path / "in", tmp_path / "out", "--buckets", SIDE],
        "bench": ["--size", SIDE],
        "tune": ["--size", SIDE],
        "compare": [tmp_path / "in" / "000.png"],
    }[verb]
    fixed = ["--vae", "tiny", "--dtype", "fp32", "--device", "cpu"]
    plan, *_, last = CliRunner().invoke(cli, [verb, *map(str, rest), *fixed]).stderr.splitlines()
    assert "  tiny (a model for trying things out: no diffusion model knows its latents)  " in plan
    assert last == "fastvae: the plan was printed"


def test_the_plans_are_those_of_every_verb():
    assert {*cli.commands} - {*PLANS} == {
        "demo",
        "plan-hardware",
    }  # demo begins with encode's; the other writes nothing


def test_an_amount_is_in_a_unit_that_does_not_read_as_nothing():
    told = [(0, "0.0 KiB"), (200, "0.2 KiB"), (104_857, "102.4 KiB"), (104_858, "0.1 MiB"), (107_374_183, "0.1 GiB")]
    told += [(107_374_182, "102.4 MiB"), (3 * 2**40, "3072.0 GiB")]
    for size, text in told:
        assert format_bytes(size) == text


def test_a_model_of_a_known_config_is_named():
    for name, preset in PRESETS.items():
        assert name in [found.name for found in matching(preset.config, preset.class_name)]
    sd15 = dict(PRESETS["sd15"].config)
    assert [preset.name for preset in matching(sd15, "AutoencoderKL")] == ["sd15"]
    listed = {**sd15, "block_out_channels": [128, 256, 512, 512]}  # as a config.json has it
    assert [preset.name for preset in matching(listed, "AutoencoderKL")] == ["sd15"]
    # Another tile size is the same model; another scaling factor is not.
    other = {preset.name for preset in matching({**sd15, "sample_size": 1}, "AutoencoderKL")}
    assert {"sd15", "sd21", "sd-vae-ft-mse"} <= other
    assert "sdxl" not in other
    assert matching({**sd15, "scaling_factor": 0.5}, "AutoencoderKL") == ()
    assert matching(sd15, "AutoencoderKLFlux2") == ()
