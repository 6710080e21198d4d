"""`fastvae plan-hardware`: what follows from the stages, and what the command says of a folder."""

import json

import pytest
from click.testing import CliRunner
from support.small_store import write_pictures

from fastvae.cli.main import cli
from fastvae.data.encoding.image_reader import ImageReader
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import SINGLE
from fastvae.data.sources.open import open_source
from fastvae.report import hardware_plan
from fastvae.report.hardware_plan import conclusion, measure, plan_hardware

STAGES = {"decode_ms": 5.0, "other_ms": 1.0, "encode_ms": 1.9, "resize_ms": 0.1, "pillow_resize_ms": 8.0}


@pytest.mark.parametrize(
    ("cores", "bottleneck", "rate"), [(2, "cores", 2000 / 6), (4, "device", 500)], ids=["few cores", "enough cores"]
)
def test_the_slower_of_cores_and_device_decides_the_rate(cores, bottleneck, rate):
    found = conclusion(STAGES, row_bytes=10**6, cores=cores, pictures=1000)
    assert found["bottleneck"] == bottleneck
    assert found["images_per_s"] == pytest.approx(rate)
    assert found["store_mb_per_s"] == pytest.approx(rate)
    assert found["seconds"] == pytest.approx(1000 / rate)
    assert (found["cores_needed"], found["cores_needed_if_pillow_resizes"]) == (3, 7)


def test_the_command_says_each_stage(tmp_path):
    write_pictures(tmp_path / "in", 5)
    (tmp_path / "in" / "002.png").write_bytes(b"\x89PNG\r\n\x1a\nspoilt")
    options = [str(tmp_path / "in"), "--vae", "tiny", "--buckets", "32", "--encode-ms", "2"]
    said = CliRunner().invoke(cli, ["plan-hardware", *options])
    assert said.exit_code == 0, said.output
    stages = ("sample", "decode", "resize", "encode", "cores", "store", "bottleneck")
    assert tuple(line.split()[0] for line in said.output.splitlines()) == stages
    assert "4 of 5 pictures, 1 unusable" in said.output
    assert "predicted" in said.output
    told = json.loads(CliRunner().invoke(cli, ["plan-hardware", *options, "--resize-ms", "1", "--json"]).stdout)
    assert (told["encode_ms"], told["resize_ms"], told["resize_predicted"]) == (2.0, 1.0, False)


def test_the_encoder_of_this_device_is_timed(tmp_path):
    write_pictures(tmp_path / "in", 2)
    found = plan_hardware(str(tmp_path / "in"), "tiny", buckets="32", device="cpu", dtype="fp32")
    assert found["encode_measured"]
    assert found["encode_ms"] > 0


def test_a_source_without_a_usable_picture_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nspoilt")
    with pytest.raises(ValueError, match=r"src must hold a picture that can be read, got .*: 1 could not be"):
        plan_hardware(str(tmp_path), "tiny", encode_ms=1.0)


@pytest.mark.parametrize("name", ["encode_ms", "resize_ms"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0], ids=str)
def test_milliseconds_that_cannot_be_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name} must be from 0.* milliseconds, got"):
        plan_hardware("nowhere", "tiny", **{name: value})


def test_a_large_sample_does_not_keep_every_pictures_pixels(tmp_path, monkeypatch):
    write_pictures(tmp_path / "in", 5)
    monkeypatch.setattr(hardware_plan, "KEPT", 2)
    source, buckets = open_source(tmp_path / "in"), Buckets.parse(32, 8)
    files = source.listing().files
    sample = measure(ImageReader(source, buckets, SINGLE, "white", 8, 10**6), files)
    assert len(sample.decode_ms) == 5
    assert {bucket: len(pixels) for bucket, pixels in sample.pixels.items()} == {(32, 32): 2}
