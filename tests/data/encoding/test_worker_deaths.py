"""Units that ended processes before: each image is decoded in a child process, and one that ends it fails alone."""

import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from support.fatal_reader import FatalReader
from support.small_store import SIDE, picture, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.worker import MAX_DEATHS
from fastvae.data.images.errors import ImageError
from fastvae.data.store.leases import Leases

OPTIONS = {"vae": small_vae(), "buckets": SIDE, "dtype": "fp32", "device": "cpu", "workers": 1, "progress": False}


@pytest.fixture
def after_deaths(monkeypatch):
    """Let every unit count as one that MAX_DEATHS processes died on, with a reader that ends its process."""
    monkeypatch.setattr(Leases, "is_taken", lambda leases, name: name.isdigit())
    monkeypatch.setattr(Leases, "deaths", lambda leases, name: MAX_DEATHS)
    monkeypatch.setattr("fastvae.data.encoding.run.ImageReader", FatalReader)


def archive(path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_rows_of_a_tar_have_the_masks_variants_flags_and_reasons_of_a_run_without_a_child(
    tmp_path, after_deaths, monkeypatch
):
    opaque = np.full((40, 48), 255, np.uint8)
    opaque[:, :20] = 90
    images = [picture(number) for number in range(4)]
    images[1].putalpha(Image.fromarray(opaque))
    files = {f"{number}.png": png(image) for number, image in enumerate(images)}
    files |= {
        "2 cut.png": files["2.png"][:900],
        "3 no image.png": b"text",
        "4.jpg": b"\xff\xd8\xff\xf7\0\x0b" + bytes(9),
    }
    small = io.BytesIO()
    picture(9, 20, 16).save(small, "WEBP")
    files["5.webp"] = small.getvalue()  # counted as upscaled
    options = OPTIONS | {"alpha": "mask", "crop": "random", "variants": 2, "flip": True, "max_failures": 99}
    archive(tmp_path / "without.tar", files)
    archive(tmp_path / "with.tar", {**files, "1 fatal.png": files["1.png"]})
    made = encode(tmp_path / "with.tar", tmp_path / "apart", **options)
    monkeypatch.setattr(Leases, "deaths", lambda leases, name: 0)
    expected = encode(tmp_path / "without.tar", tmp_path / "whole", **options)
    made_rows, expected_rows = committed(tmp_path / "apart"), committed(tmp_path / "whole")
    assert made_rows.keys() == expected_rows.keys()
    assert [name for name in made_rows if made_rows[name] != expected_rows[name]] == []
    reasons = json.loads(made.to_json())["reasons"]
    assert reasons.pop("worker_died") == 4  # one image, two crops, each mirrored too
    assert reasons == expected.reasons
    assert set(reasons) >= {"truncated", "unsupported"}
    assert made.flags == expected.flags
    assert made.flags["upscaled"] > 0
    (note,) = [note for note in json.loads(made.to_json())["notes"] if "processes died" in note]
    assert note.startswith("3 processes died while they encoded the unit of ")
    assert note.endswith("its images were decoded one by one in a child process")


def test_with_on_error_fail_the_image_that_ended_the_child_is_named(tmp_path, after_deaths):
    write_pictures(tmp_path / "in", 2)
    (tmp_path / "in" / "001.png").rename(tmp_path / "in" / "001 fatal.png")
    with pytest.raises(ImageError, match=r"ended while they decoded 001 fatal\.png: signal 9") as error:
        encode(tmp_path / "in", tmp_path / "out", on_error="fail", **OPTIONS)
    assert error.value.reason == "worker_died"
    assert not list((tmp_path / "out" / "leases").glob("*.lease"))


def test_row_35_an_image_that_stops_its_child_for_ever_costs_its_row_alone(tmp_path, after_deaths, monkeypatch):
    monkeypatch.setattr("fastvae.data.encoding.image_reader.DECODE_SECONDS", 4)
    write_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "001.png").rename(tmp_path / "in" / "001 endless.png")
    report = encode(tmp_path / "in", tmp_path / "out", max_failures=1, **OPTIONS)
    assert json.loads(report.to_json())["reasons"] == {"timed_out": 1}
    assert report.failures == [
        "timed_out: 001 endless.png was not decoded: the child process had no answer in 8 s",
    ]
    assert sorted(committed(tmp_path / "out")) == [("000.png", 0), ("002.png", 0)]


def test_an_image_whose_child_was_ended_once_by_something_else_is_encoded(tmp_path, after_deaths, monkeypatch):
    """The system ends a process for want of memory, and may choose any."""
    write_pictures(tmp_path / "in", 2)
    monkeypatch.setenv("FATAL_ONCE", str(tmp_path / "ended"))
    assert encode(tmp_path / "in", tmp_path / "out", **OPTIONS).ok == 2
    assert (tmp_path / "ended").exists()
    assert failures(tmp_path / "out") == {}


def test_a_file_that_is_removed_during_the_run_is_unreadable_not_worker_died(tmp_path, after_deaths, monkeypatch):
    write_pictures(tmp_path / "in", 2)
    real = os.replace  # the plan is written by a rename: the image goes after it

    def replace(*paths):
        (tmp_path / "in" / "001.png").unlink(missing_ok=True)
        real(*paths)

    monkeypatch.setattr("fastvae.system.atomic_files.os.replace", replace)
    encode(tmp_path / "in", tmp_path / "out", max_failures=1, **OPTIONS)
    assert failures(tmp_path / "out") == {"001.png": "unreadable"}
