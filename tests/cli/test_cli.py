"""The command line: its output, its exit codes, and foreseen errors without a traceback."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from support.forks import CLOSED
from support.small_store import SIDE, picture, small_vae, write_pictures

import fastvae.system.atomic_files
from fastvae.cli.main import cli
from fastvae.cli.output import parse_count
from fastvae.data.decoding.demo import PHOTOGRAPHS
from fastvae.data.store.lock import locked
from fastvae.system.terminal import strip_control_characters

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pictures(tmp_path):
    write_pictures(tmp_path / "in", 4)
    return str(tmp_path / "in")


def run(*arguments, code=0):
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.stderr
    return result


def encode(pictures, out, model, *more, code=0):
    return run("encode", pictures, out, "--vae", model, "--buckets", SIDE, "--dtype", "fp32", *more, code=code)


def test_encode_info_decode(pictures, model, tmp_path):
    out = tmp_path / "out"
    result = encode(pictures, out, model)
    plan = result.stderr.splitlines()[0]
    assert plan.startswith(f"encode  {model}  fp32  dist  bucket 32x32  4 images")
    assert result.stdout.splitlines()[0].startswith("done    4 ok, 0 resumed, 0 quarantined")
    assert "images/s" in result.stdout
    facts = json.loads(run("info", out, "--json").stdout)
    assert (facts["rows"], facts["failed"], facts["units"]) == (4, 0, {"planned": 1, "committed": 1})
    assert facts["latent_bytes_per_row"] == 4 * 4 * 4 * 2 * 2
    assert facts["source"]["vae"] == model
    assert "rows" in run("info", out).stdout
    files = json.loads(run("decode", out, tmp_path / "png", "--rows", "1:3", "--json").stdout)["files"]
    assert [entry["key"] for entry in files] == ["001.png", "002.png"]
    with Image.open(files[0]["file"]) as image:
        assert image.size == (SIDE, SIDE)
    shown = run("decode", out, tmp_path / "png", "--rows", "0", "--vae", model).stdout
    assert shown == f"{tmp_path / 'png'}/000000-000.png.png  000.png\n"


def test_decode_makes_a_contact_sheet(pictures, model, tmp_path):
    out, sheet = tmp_path / "out", tmp_path / "sheet.png"
    encode(pictures, out, model)
    run("decode", out, tmp_path / "png", "--rows", "0:3", "--sheet", sheet)
    with Image.open(sheet) as whole:
        assert (whole.format, whole.size) == ("PNG", (2 * (SIDE + 8), 2 * (SIDE + 24)))
        pixels = np.asarray(whole)
    for row, (left, top) in enumerate([(0, 0), (SIDE + 8, 0), (0, SIDE + 24)]):
        with Image.open(tmp_path / "png" / f"00000{row}-00{row}.png.png") as image:
            assert np.array_equal(pixels[top + 16 : top + 16 + SIDE, left : left + SIDE], np.asarray(image))


def test_export_prints_its_plan_and_its_result(pictures, model, tmp_path):
    out = tmp_path / "out"
    encode(pictures, out, model)
    result = run("export", out, tmp_path / "tars", "--to", "wds")
    assert f"{out}  4 rows  wds  dist  raw  ~1.0 KiB (free " in result.stderr
    assert result.stdout.startswith("done    4 rows (dist, raw) in 2 files, ")
    facts = json.loads(run("export", out, tmp_path / "npz", "--to", "npz-kohya", "--json", "-q").stdout)
    assert (facts["rows"], facts["files"], facts["about"]["family"]) == (4, 5, "sdxl")
    refused = run("export", out, tmp_path / "new", "--to", "wds", "--family", "sd", code=2)
    assert "family must be left out for wds" in refused.stderr
    again = run("export", out, tmp_path / "tars", "--to", "wds", code=1)
    assert again.stderr == f"fastvae: dst must be a new folder, {tmp_path / 'tars'} is there already\n"


def test_export_decode_and_info_of_a_store_that_is_not_finished_say_so(model, tmp_path):
    write_pictures(tmp_path / "in", 6)
    out = tmp_path / "out"
    encode(tmp_path / "in", out, model, "--shard-mb", 0.002, "-q")
    next((out / "shards").glob("000001-*.json")).unlink()
    done = run("export", out, tmp_path / "tars", "--to", "wds", "-q").stdout
    assert done.startswith("done    4 rows (dist, raw) in 2 files, ")
    assert done.endswith(
        ": {}; 2 rows are planned and not committed: fastvae verify says why\n".format(tmp_path / "tars")
    )
    assert json.loads(run("export", out, tmp_path / "npz", "--to", "npz-kohya", "--json").stdout)["pending"] == 2
    said = run("decode", out, tmp_path / "png").stderr
    assert "  4 of 4 rows, 2 planned ones not committed  at most" in said
    facts = json.loads(run("info", out, "--json").stdout)
    assert (facts["rows"], facts["planned_rows"], facts["pending_rows"]) == (4, 6, 2)


def test_buckets_variants_and_a_dry_run(pictures, model, tmp_path):
    picture(7, 30, 90).save(Path(pictures) / "tall.png")
    more = ["--vae", model, "--buckets", "sdxl@64", "--dtype", "fp32", "--crop", "random", "--variants", 2, "--flip"]
    more += ["--seed", 3, "--logvar", "u8"]
    result = run("encode", pictures, tmp_path / "out", *more, "--dry-run")
    assert result.stdout.startswith("planned 20 rows to encode")
    assert "bucket  " in result.stdout
    assert not (tmp_path / "out").exists()
    result = run("encode", pictures, tmp_path / "out", *more)
    assert "buckets sdxl@64 (23)  20 rows, 4 an image" in result.stderr.splitlines()[0]
    facts = json.loads(run("info", tmp_path / "out", "--json").stdout)
    assert facts["rows"] == sum(facts["buckets"].values()) == 20
    assert len(facts["buckets"]) == 2
    assert facts["preprocess"]["crop"] == "random, seed 3"


def test_a_manifest_is_a_source_with_columns_of_any_name(pictures, model, tmp_path):
    lines = [json.dumps({"id": f"k{n}", "file": f"in/00{n}.png"}) for n in range(3)]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    encode(tmp_path / "list.jsonl", out, model, "--image-column", "file", "--key-column", "id", "--posterior", "sample")
    index = [json.loads(line)["key"] for line in (out / "index.jsonl").read_text().splitlines()]
    assert index == ["k0", "k1", "k2"]


def test_a_second_run_resumes(pictures, model, tmp_path):
    encode(pictures, tmp_path / "out", model)
    result = encode(pictures, tmp_path / "out", model)
    assert "resume  4 rows committed before" in result.stderr
    assert result.stdout.startswith("done    0 ok, 4 resumed")


def test_json_is_one_document_and_quiet_leaves_the_report(pictures, model, tmp_path):
    result = encode(pictures, tmp_path / "out", model, "--json")
    report = json.loads(result.stdout)
    assert (report["ok"], report["failed"], report["dtype"], report["dtype_error"]) == (4, 0, "fp32", None)
    assert result.stderr.startswith("encode  ")
    result = encode(pictures, tmp_path / "out", model, "-q")
    assert result.stdout.startswith("done    0 ok, 4 resumed")
    assert result.stderr == ""


def test_bf16_states_its_error_in_the_plan(pictures, model, tmp_path):
    result = run("encode", pictures, tmp_path / "out", "--vae", model, "--buckets", SIDE, "--dtype", "bf16")
    assert "bf16 (error vs fp32 " in result.stderr.splitlines()[0]


def test_failures_above_the_limit_are_exit_code_3(pictures, model, tmp_path):
    (Path(pictures) / "bad.png").write_bytes(b"")
    result = encode(pictures, tmp_path / "out", model, code=3)
    assert "4 ok" in result.stdout
    assert "failed  empty 1" in result.stdout
    encode(pictures, tmp_path / "out", model, "--max-failures", "20%", code=0)
    result = encode(pictures, tmp_path / "strict", model, "--on-error", "fail", code=3)
    assert result.stderr.splitlines()[-1] == "fastvae: empty: bad.png holds no bytes"


def test_retry_failed_encodes_only_failed_images_again(pictures, model, tmp_path):
    bad, out = Path(pictures) / "000.png", tmp_path / "out"
    whole, times = bad.read_bytes(), bad.stat()
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(len(whole) - 8))
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = encode(pictures, out, model, code=3)
    assert "see " + str(out / "failures.jsonl") + "; again with --retry-failed" in result.stdout
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "shards").iterdir()}
    bad.write_bytes(whole)  # size and time as before: neither shows the edit
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "0 ok, 3 resumed, 1 quarantined" in encode(pictures, out, model, code=3).stdout
    result = encode(pictures, out, model, "--retry-failed").stdout
    assert result.startswith("done    1 ok, 3 resumed, 0 quarantined")
    assert "has failed before" not in result
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (out / "failures.jsonl").read_text() == ""
    result = encode(pictures, out, model, "--retry-failed").stdout
    assert result.startswith("done    0 ok, 4 resumed")
    assert result.splitlines()[-1].startswith("note    no image of the source has failed before")


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


def test_the_device_is_an_option(pictures, model, tmp_path):
    encode(pictures, tmp_path / "out", model, "--device", "cpu")
    run("decode", tmp_path / "out", tmp_path / "png", "--device", "cpu")
    for command in (["encode", pictures, tmp_path / "other", "--vae", model], ["decode", tmp_path / "out", tmp_path]):
        result = run(*command, "--device", "gpu", code=2)
        assert "fastvae: device must be one of this machine's, such as 'cpu' or 'cuda:0', got 'gpu'" in result.stderr
        result = run(*command, "--device", "cpu:5", code=2)
        assert "got 'cpu:5' (there is one CPU, and it has no number)" in result.stderr


def test_an_interruption_is_exit_code_75(pictures, model, tmp_path, monkeypatch):
    def interrupt(self, pixels):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastvae.data.encoding.encoder.MomentEncoder.start", interrupt)
    result = encode(pictures, tmp_path / "out", model, code=75)
    assert result.stderr.splitlines()[-1] == "fastvae: interrupted; run the same command again to go on"


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
        (["encode", "{empty}", "{out}"], "no images under"),
        (["encode", "{in}", "{in}"], "out must be another folder than src"),
        (["encode", "{in}/nothing", "{out}"], "the source must be a folder of images"),
        (["encode", "{in}", "{out}", "--max-pixels", "lots"], "expected a count such as 178M, got 'lots'"),
        (["encode", "{in}", "{out}", "--max-failures", "some"], "max_failures must be"),
        (["encode", "{in}", "{out}", "--batch", "0"], "batch must be 'auto' or at least 1"),
        (["decode", "{empty}", "{out}", "--rows", "x"], "rows must look like 0:16"),
        (["encode"], "Missing argument 'SRC...'"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else "",
)
def test_wrong_usage_is_exit_code_2_and_a_sentence(arguments, words, pictures, model, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"{in}": pictures, "{out}": str(tmp_path / "out"), "{empty}": str(tmp_path / "empty")}
    for place, path in places.items():
        arguments = [argument.replace(place, path) for argument in arguments]
    if arguments[0] == "encode" and len(arguments) > 1:
        arguments = [*arguments, "--vae", model]
    result = run(*arguments, code=2)
    assert words in " ".join(result.stderr.replace("│", " ").split())


def test_a_missing_model_is_one_sentence(pictures, tmp_path):
    (tmp_path / "no model").mkdir()
    for command in (["encode", pictures, tmp_path / "out", "--vae"], ["info"]):
        result = CliRunner().invoke(cli, [*map(str, command), str(tmp_path / "no model")])
        assert result.exit_code in (1, 2)
        assert isinstance(result.exception, SystemExit)
        assert result.stderr.splitlines()[-1].startswith("fastvae: ")


def test_info_of_a_model(model):
    facts = json.loads(run("info", model, "--json").stdout)
    vae = small_vae()
    assert facts["kind"] == "model"
    assert facts["parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert facts["downsample_factor"] == 8
    assert (facts["dtype"], facts["latent_channels"]) == ("float32", 4)
    assert facts["scaling"]["scaling_factor"] == vae.config.scaling_factor
    assert facts["config"]["block_out_channels"] == [8, 8, 16, 16]
    assert facts["presets"] == []
    assert "parameters" in run("info", model).stdout


def test_demo_makes_a_store_and_a_sheet(model, tmp_path):
    pytest.importorskip("skimage")
    result = run("demo", tmp_path / "demo", "--vae", model)
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(PHOTOGRAPHS)]] == sorted(f"{name}.jpg" for name in PHOTOGRAPHS)
    assert lines[len(PHOTOGRAPHS)].startswith("mean")
    assert "images/s" in lines[len(PHOTOGRAPHS) + 1]
    facts = json.loads(run("demo", tmp_path / "demo", "--vae", model, "--json", "-q").stdout)
    assert facts["encode"]["resumed"] == len(PHOTOGRAPHS)
    assert facts["mean_psnr"] == pytest.approx(np.mean(list(facts["psnr"].values())), abs=0.005)  # rounded to 0.01
    with Image.open(facts["sheet"]) as image:
        sheet = np.asarray(image)
    assert sheet.shape[1] == 2 * (2 * 256 + 8)
    # A photograph, not a flat field: the original of the first pair has the spread of one.
    assert sheet[20:260, :256].std() > 20


def test_demo_without_scikit_image_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    result = run("demo", tmp_path / "demo", code=1)
    assert 'pip install "fastvae[demo]"' in result.stderr


def test_row_33_names_cannot_drive_the_terminal(model, tmp_path):
    (tmp_path / "in").mkdir()
    picture(0).save(tmp_path / "in" / "x.png")
    os.rename(tmp_path / "in" / "x.png", tmp_path / "in" / "a\x1b[31mred\x07.png")
    (tmp_path / "in" / "b\x1b]0;title\x07.png").write_bytes(b"")
    result = encode(tmp_path / "in", tmp_path / "out", model, "--max-failures", 1)
    assert "\x1b" not in result.output
    result = encode(tmp_path / "in", tmp_path / "strict", model, "--on-error", "fail", code=3)
    assert "\x1b" not in result.output
    shown = run("decode", tmp_path / "out", tmp_path / "png").output
    assert "\x1b" not in shown
    assert "a?[31mred?.png" in shown
    assert strip_control_characters("café ‮x\n") == "café ?x\n"


@pytest.mark.parametrize(("text", "count"), [("178M", 178_000_000), ("1.5k", 1500), ("12", 12), ("2G", 2 * 10**9)])
def test_counts(text, count):
    assert parse_count(text) == count


def test_as_a_process_without_torch_for_help(forks, pictures, model, tmp_path):
    """python -m fastvae: help is light, a run works, and a wrong one is one line on stderr."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    probe = (
        "import sys, runpy; sys.argv = ['fastvae', 'encode', '--help']\n"
        "try: runpy.run_module('fastvae', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'diffusers', 'numpy', 'PIL', 'tqdm', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", probe], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [sys.executable, "-m", "fastvae", "encode", pictures, tmp_path / "out", "--vae", model]
    done = subprocess.run(
        [*command, "--buckets", str(SIDE), "--json", "-q"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] == 4
    assert done.stderr == ""
    done = forks.fastvae(*command[3:], "--buckets", "7")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastvae: buckets must be a multiple of the model's 8 pixels, got 7 in '7'\n"


def test_a_closed_pipe_is_exit_code_141(forks, pictures, model, tmp_path):
    """As with `| head -1`: the other end of the pipe is closed when the report comes."""
    encode(pictures, tmp_path / "out", model)
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = forks.fastvae("info", tmp_path / "out", "-q", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_full_stdout_is_no_full_store_and_a_full_stderr_is_no_error(forks, pictures, model, tmp_path):
    options = ["--vae", model, "--buckets", SIDE, "--dtype", "fp32"]
    with open("/dev/full", "w") as full:
        done = forks.fastvae("encode", pictures, tmp_path / "out", *options, stdout=full)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("fastvae: the work is done, but its report could not be written")
        done = forks.fastvae("encode", pictures, tmp_path / "other", *options, stderr=full)
        assert (done.returncode, done.stdout.split(" ok")[0]) == (0, "done    4")
        done = forks.fastvae("info", tmp_path / "nothing", stderr=full)
        assert done.returncode == 1


@pytest.mark.skipif(os.name != "posix", reason="closes a descriptor before the program starts")
def test_a_closed_stderr_stops_nothing(forks, pictures, model, tmp_path):
    options = ["--vae", model, "--buckets", SIDE, "--dtype", "fp32"]
    done = forks.fastvae("encode", pictures, tmp_path / "out", *options, stderr=CLOSED)
    assert (done.returncode, done.stdout.split(" ok")[0]) == (0, "done    4")


def test_a_store_that_stays_locked_is_exit_code_5(pictures, model, tmp_path, monkeypatch):
    pytest.importorskip("fcntl", reason="this system has no such lock")
    encode(pictures, tmp_path / "out", model, "--limit", 1)
    monkeypatch.setattr("fastvae.data.store.lock.LOCK_TIMEOUT", 0.1)
    with locked(tmp_path / "out"):
        result = encode(pictures, tmp_path / "out", model, code=5)
    assert f"is locked: process {os.getpid()} has been planning it" in result.stderr
    assert "5 another run" in run("--help").stdout


def test_decode_warns_of_another_model(pictures, model, tmp_path):
    encode(pictures, tmp_path / "out", model)
    small_vae(1).save_pretrained(tmp_path / "other")
    result = run("decode", tmp_path / "out", tmp_path / "png", "-q", "--vae", tmp_path / "other")
    assert (
        result.stderr
        == f"fastvae: {tmp_path / 'other'} is another model than the one {tmp_path / 'out'} was made with\n"
    )


def test_an_infinite_quality_is_null(model, tmp_path, monkeypatch):
    pytest.importorskip("skimage")
    monkeypatch.setattr("fastvae.metrics.psnr", lambda *images: float("inf"))
    facts = json.loads(run("demo", tmp_path, "--vae", model, "--json", "-q").stdout, parse_constant=pytest.fail)
    assert facts["mean_psnr"] is None
    assert set(facts["psnr"].values()) == {None}
