"""Verbs of the command line: what they print and write."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.command_line import encode, run
from support.small_store import SIDE, picture, small_vae, write_pictures, write_store

from fastvae.data.decoding.demo import PHOTOGRAPHS


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


def test_export_names_ten_clashes_and_json_all(tmp_path):
    keys = [f"{number:02d}{ending}" for number in range(12) for ending in (".jpg", ".png")]
    store = write_store(tmp_path / "store", {(32, 32): [*keys, "one.png"]})
    lines = run("export", store, tmp_path / "npz", "--to", "npz-kohya").stdout.splitlines()
    assert lines[0] == "clash   00.jpg, 00.png would share a file: none is written, rename one"
    assert lines[9:11] == [
        "clash   09.jpg, 09.png would share a file: none is written, rename one",
        "clash   2 more files: --json names their images",
    ]
    assert lines[11].startswith("done    1 rows (sample, raw) in 2 files, ")
    facts = json.loads(run("export", store, tmp_path / "again", "--to", "npz-kohya", "--json").stdout)
    assert (facts["rows"], len(facts["clashes"])) == (1, 12)


def test_export_prints_its_plan_and_its_result(pictures, model, tmp_path):
    out = tmp_path / "out"
    encode(pictures, out, model)
    result = run("export", out, tmp_path / "tars", "--to", "wds")
    assert f"{out}  4 rows  wds  dist  raw  ~1.0 KiB (free " in result.stderr
    assert result.stdout.startswith("done    4 rows (dist, raw) in 2 files, ")
    facts = json.loads(run("export", out, tmp_path / "npz", "--to", "npz-kohya", "--json", "-q").stdout)
    assert (facts["rows"], facts["files"], facts["about"]["family"]) == (4, 5, "sd")
    assert facts["clashes"] == []
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


def test_retry_failed_encodes_only_failed_images_again(pictures, model, tmp_path):
    bad, out = Path(pictures) / "000.png", tmp_path / "out"
    whole, times = bad.read_bytes(), bad.stat()
    bad.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(len(whole) - 8))
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    result = encode(pictures, out, model, "--max-failures", 0, code=3)
    assert "see " + str(out / "failures.jsonl") + "; again with --retry-failed" in result.stdout
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (out / "shards").iterdir()}
    bad.write_bytes(whole)  # size and time as before: neither shows the edit
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "0 ok, 3 resumed, 1 quarantined" in encode(pictures, out, model, "--max-failures", 0, code=3).stdout
    result = encode(pictures, out, model, "--retry-failed").stdout
    assert result.startswith("done    1 ok, 3 resumed, 0 quarantined")
    assert "has failed before" not in result
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert (out / "failures.jsonl").read_text() == ""
    result = encode(pictures, out, model, "--retry-failed").stdout
    assert result.startswith("done    0 ok, 4 resumed")
    assert result.splitlines()[-1].startswith("note    no image of the source has failed before")


def test_the_device_is_an_option(pictures, model, tmp_path):
    encode(pictures, tmp_path / "out", model, "--device", "cpu")
    run("decode", tmp_path / "out", tmp_path / "png", "--device", "cpu")
    for command in (["encode", pictures, tmp_path / "other", "--vae", model], ["decode", tmp_path / "out", tmp_path]):
        result = run(*command, "--device", "gpu", code=2)
        assert "fastvae: device must be one of this machine's, such as 'cpu' or 'cuda:0', got 'gpu'" in result.stderr
        result = run(*command, "--device", "cpu:5", code=2)
        assert "got 'cpu:5' (there is one CPU, and it has no number)" in result.stderr


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
    assert "pip install scikit-image" in result.stderr


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
