"""Exit codes of the command line, and the sentence of each error."""

import json
import os
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.command_line import encode, run

import fastvae.system.atomic_files
from fastvae.cli.main import cli
from fastvae.cli.output import parse_count
from fastvae.data.store.lock import locked


def test_failures_above_the_limit_are_exit_code_3(pictures, model, tmp_path):
    (Path(pictures) / "bad.png").write_bytes(b"")
    result = encode(pictures, tmp_path / "out", model, "--max-failures", 0, code=3)
    assert "4 ok" in result.stdout
    assert "failed  empty 1" in result.stdout
    assert "failed  more than --max-failures allows: exit code 3\n" in result.stdout
    allowed = encode(pictures, tmp_path / "out", model, "--max-failures", "20%", code=0)
    assert "more than" not in allowed.stdout
    result = encode(pictures, tmp_path / "strict", model, "--on-error", "fail", code=3)
    assert result.stderr.splitlines()[-1] == "fastvae: empty: bad.png holds no bytes"


def test_row_25_another_identity_is_exit_code_4_with_the_difference(pictures, model, tmp_path):
    encode(pictures, tmp_path / "out", model)
    result = encode(pictures, tmp_path / "out", model, "--posterior", "mean", code=4)
    assert 'numerics.posterior: the store has "dist", this run "mean"' in result.stderr
    assert result.stdout == ""


def test_row_15_a_full_disk_is_exit_code_6(pictures, model, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fastvae.system.atomic_files.os, "fsync", full)
    result = encode(pictures, tmp_path / "out", model, code=6)
    assert result.stderr.splitlines()[-1].startswith("fastvae: no space left")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("no store", "is not a latent store: it has no store.json"),
        ("damaged store.json", "is not readable as JSON"),
        ("damaged shard", "000000-32x32.safetensors is damaged"),
    ],
)
def test_a_store_that_is_damaged_or_none_is_exit_code_1(damage, words, pictures, model, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    if damage != "no store":
        encode(pictures, out, model)
    if damage == "damaged store.json":
        (out / "store.json").write_text("{")
    elif damage == "damaged shard":
        shard = next(out.glob("shards/*.safetensors"))
        shard.write_bytes(b"\xff" * shard.stat().st_size)
    result = run("decode", out, tmp_path / "png", code=1)
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback_before_the_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTVAE_DEBUG", "1")
    result = CliRunner().invoke(cli, ["decode", str(tmp_path), str(tmp_path / "png")])
    assert result.exit_code == 1
    lines = result.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-1] == f"fastvae: {tmp_path} is not a latent store: it has no store.json"
    assert "FASTVAE_DEBUG=1" in run("--help").stdout


def test_an_interruption_is_exit_code_75(pictures, model, tmp_path, monkeypatch):
    def interrupt(self, pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvae.data.encoding.encoder.MomentEncoder.start", interrupt)
    result = encode(pictures, tmp_path / "out", model, code=75)
    said = r"fastvae: interrupted: 0 rows committed, [1-9] lost; run the same command again to go on"
    assert re.fullmatch(said, result.stderr.splitlines()[-1])


def test_an_output_that_is_a_link_to_nothing_is_a_sentence(pictures, model, tmp_path):
    (tmp_path / "out").symlink_to(tmp_path / "gone")
    result = encode(pictures, tmp_path / "out", model, code=1)
    said = f"the output must be a folder, {tmp_path / 'out'} is a link to {tmp_path / 'gone'}, which is not there"
    assert result.stderr.splitlines()[-1] == f"fastvae: {said}"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["encode", "{in}", "{out}", "--buckets", "sd"],
            "buckets must be a side in pixels such as 512, 'sdxl', 'flux' or a JSON file, scaled down as in",
        ),
        (["encode", "{in}", "{out}", "--buckets", "36"], "buckets must be a multiple of the model's 8 pixels"),
        (
            ["encode", "{in}", "{out}", "--buckets", "sdxl@0"],
            "buckets must be scaled to a side of at least the model's 8",
        ),
        (["encode", "{empty}", "{out}"], "src must hold images, there is none under"),
        (["encode", "{in}", "{in}"], "out must be another folder than src"),
        (["encode", "{in}/nothing", "{out}"], "src must be a folder of images"),
        (["encode", "{in}", "{out}", "--max-pixels", "lots"], "expected a count such as 178M, got 'lots'"),
        (["encode", "{in}", "{out}", "--max-failures", "some"], "max_failures must be"),
        (["encode", "{in}", "{out}", "--batch", "0"], "batch must be 'auto' or at least 1"),
        (["decode", "{empty}", "{out}", "--rows", "x"], "rows must look like 0:16"),
        (["encode", "{in}", ""], "OUT must be the folder of the store, got an empty name"),
        (["encode"], "SRC, the images, and OUT, the folder of the store, must be named, got neither"),
        (["encode", "{in}"], "SRC, the images, and OUT, the folder of the store, must be named, got only '{in}'"),
        (["encode", "{in}", "{out}", "--vae"], "Option '--vae' requires an argument"),
        (["tune"], '--vae must name the model: a directory, a Hub id, a single file, or "tiny"'),
        (["bench"], '--vae must name the model: a directory, a Hub id, a single file, or "tiny"'),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2_and_a_sentence(arguments, words, pictures, model, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"{in}": pictures, "{out}": str(tmp_path / "out"), "{empty}": str(tmp_path / "empty")}
    for place, path in places.items():
        arguments = [argument.replace(place, path) for argument in arguments]
    if arguments[0] == "encode" and arguments[-1] != "--vae":
        arguments = [*arguments, "--vae", model]
    result = run(*arguments, code=2)
    assert words.replace("{in}", str(pictures)) in " ".join(result.stderr.replace("│", " ").split())


@pytest.mark.parametrize("verb", ["encode", "bench", "compare"])
def test_the_model_has_no_default(verb, pictures, tmp_path):
    paths = {"encode": [pictures, tmp_path / "out"], "bench": [], "compare": [next(Path(pictures).iterdir())]}[verb]
    said = " ".join(run(verb, *paths, code=2).stderr.replace("│", " ").split())
    assert (
        '--vae must name the model: a directory, a Hub id, a single file, or "tiny", a small model of this package'
        in said
    )
    assert not (tmp_path / "out").exists()


def test_five_broken_images_are_no_failed_run_and_are_named(pictures, model, tmp_path):
    for number in range(5):
        (Path(pictures) / f"bad{number}.png").write_bytes(b"")
    report = json.loads(encode(pictures, tmp_path / "out", model, "--flip", "--json").stdout)
    assert (report["exceeded"], report["reasons"]) == (False, {"empty": 10})
    assert report["failures"] == [f"empty: bad{number}.png holds no bytes" for number in range(5)]
    (Path(pictures) / "bad5.png").write_bytes(b"")
    assert "empty: bad5.png holds no bytes" in encode(pictures, tmp_path / "out", model, "--flip", code=3).stdout


def test_a_missing_model_is_one_sentence(pictures, tmp_path):
    (tmp_path / "no model").mkdir()
    for command in (["encode", pictures, tmp_path / "out", "--vae"], ["info"]):
        result = CliRunner().invoke(cli, [*map(str, command), str(tmp_path / "no model")])
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.splitlines()[-1].startswith("fastvae: ")


def test_a_store_that_stays_locked_is_exit_code_5(pictures, model, tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no such lock")
    encode(pictures, tmp_path / "out", model, "--limit", 1)
    monkeypatch.setattr("fastvae.data.store.lock.LOCK_TIMEOUT", 0.1)
    with locked(tmp_path / "out"):
        result = encode(pictures, tmp_path / "out", model, code=5)
    assert f"is locked: process {os.getpid()} has been planning it" in result.stderr
    assert "another run has been planning the store" in run("--help").stdout


@pytest.mark.parametrize(("text", "count"), [("178M", 178_000_000), ("1.5k", 1500), ("12", 12), ("2G", 2 * 10**9)])
def test_counts(text, count):
    assert parse_count(text) == count
