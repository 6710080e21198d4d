"""A decoder that does not return: its image is given up, and all others are read."""

import json
import threading

import numpy as np
import pytest
from data.failures.corpus import EVERY_KIND, SMALL, encoded
from support.small_store import SIDE, small_vae, write_pictures
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.images import decoder
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import image_size, read_image

ENDLESS = encoded(SMALL.resize((37, 31)), "WEBP")


@pytest.fixture
def endless(monkeypatch):
    """Let Pillow never return from an image of 37 x 31, and a decode have two seconds."""
    end, real = threading.Event(), decoder._open

    def opens(file, image_format, name):
        image = real(file, image_format, name)
        if image.size == (37, 31):
            end.wait(600)
        return image

    monkeypatch.setattr(decoder, "_open", opens)
    monkeypatch.setattr("fastvae.data.images.read.DECODE_SECONDS", 2)
    yield
    end.set()


def test_row_35_an_image_whose_decoder_hangs_is_given_up_by_name(endless):
    with pytest.raises(ImageError, match=r"timed_out: a\.webp was not decoded in 2 s"):
        read_image(ENDLESS, name="a.webp")
    assert image_size(ENDLESS) == (31, 37)


def test_row_35_a_large_image_whose_decoder_hangs_holds_up_no_other(endless, monkeypatch):
    monkeypatch.setattr("fastvae.data.images.read.LARGE_PIXELS", 1)
    with pytest.raises(ImageError, match="timed_out"):
        read_image(ENDLESS)
    assert (np.asarray(read_image(EVERY_KIND["png"]).image) == np.asarray(SMALL)).all()


def test_row_35_a_run_with_an_image_whose_decoder_hangs_loses_that_row_alone(endless, tmp_path):
    write_pictures(tmp_path / "in", 3)
    (tmp_path / "in" / "1.webp").write_bytes(ENDLESS)
    options = {"vae": small_vae(), "buckets": SIDE, "dtype": "bf16", "progress": False, "device": "cpu", "workers": 2}
    report = encode(tmp_path / "in", tmp_path / "out", max_failures=1, **options)
    assert failures(tmp_path / "out") == {"1.webp": "timed_out"}
    assert json.loads(report.to_json())["reasons"] == {"timed_out": 1}
    assert sorted(key for key, _ in committed(tmp_path / "out")) == ["000.png", "001.png", "002.png"]
