"""Failure modes 1 to 11: bad images in a run. The rules are tested in tests/data/images, by the same numbers."""

import subprocess
import sys
import time

import numpy as np
import pytest
from data.failures.corpus import EVERY_KIND, bad_images, dimension_bomb, encoded, other_bombs, write_bad_images
from PIL import Image, ImageFile
from support.small_store import SIDE, picture, small_vae
from support.store_checks import committed, failures

from fastvae.data.encoding.encode import encode
from fastvae.data.images.errors import ImageError
from fastvae.data.images.read import DEFAULT_MAX_PIXELS, image_size, read_image
from fastvae.data.store.errors import IdentityMismatch

OPTIONS = {"buckets": SIDE, "dtype": "fp32", "progress": False, "device": "cpu"}
BOMB_SECONDS, BOMB_MEGABYTES = 0.05, 64


BAD_IN = [pytest.param(40, 240, id="short"), pytest.param(50, 1000, id="long", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("bad", "count"), BAD_IN)
def test_row_01_fifty_bad_images_of_a_thousand_are_fifty_quarantined_rows(tmp_path, bad, count):
    """The short form has forty of 240, every kind once."""
    source = tmp_path / "in"
    source.mkdir()
    formats = [("JPEG", ".jpg"), ("PNG", ".png"), ("WEBP", ".webp"), ("BMP", ".bmp"), ("TIFF", ".tif")]
    good = []
    for number in range(count - bad):
        image_format, suffix = formats[number % len(formats)]
        good.append(f"{number:03d}{suffix}")
        picture(number, 40, 36).save(source / good[-1], image_format)
    wanted = write_bad_images(source, bad)
    assert len(set(wanted.values())) >= 7
    report = encode(source, tmp_path / "out", vae=small_vae(), max_failures=bad, shard_mb=0.1, **OPTIONS)
    assert (report.ok, report.failed, report.exceeded) == (count - bad, bad, False)
    assert failures(tmp_path / "out") == wanted
    assert sorted(committed(tmp_path / "out")) == [(key, 0) for key in good]


def picture_or_reason(data: bytes) -> np.ndarray | str:
    try:
        return np.asarray(read_image(data).image)
    except ImageError as error:
        return error.reason


def test_row_02_twenty_files_cut_at_two_hundred_offsets(tmp_path):
    """A cut file is refused or read whole; none gives a partial picture."""
    kinds = [("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("TIFF", {}), ("BMP", {})]
    kinds += [("GIF", {}), ("AVIF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("WEBP", {"lossless": True})]
    accepted = 0
    for number in range(20):
        image_format, options = kinds[number % len(kinds)]
        data = encoded(picture(number, 200, 150), image_format, **options)
        whole = np.asarray(read_image(data).image)
        for cut in np.linspace(1, len(data) - 1, 200).astype(int).tolist():
            found = picture_or_reason(data[:cut])
            if isinstance(found, str):
                assert found in ("truncated", "unsupported", "decode_error"), (image_format, cut)
            else:
                accepted += 1
                assert np.array_equal(found, whole), (image_format, cut)
    assert accepted <= 2  # of 4000: a GIF without its trailer


@pytest.mark.parametrize("name", ["png", *other_bombs()])
def test_row_08_a_bomb_of_any_format_is_refused_by_its_header(name, monkeypatch):
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("it was decoded"))
    bomb = {"png": dimension_bomb(), **other_bombs()}[name]
    assert len(bomb) < 4096
    for read in (read_image, image_size):
        seconds = []
        for _ in range(5):
            started = time.process_time()
            with pytest.raises(ImageError, match=f"more than {DEFAULT_MAX_PIXELS} pixels") as caught:
                read(bomb)
            seconds.append(time.process_time() - started)
        assert caught.value.reason == "too_large"
        assert min(seconds) < BOMB_SECONDS


IN_A_PROCESS_OF_ITS_OWN = """
import resource, sys
from fastvae.data.images.read import read_image, image_size
from fastvae.data.images.errors import ImageError
from data.failures.corpus import EVERY_KIND, dimension_bomb, other_bombs
[read_image(data) for data in EVERY_KIND.values()]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for _ in range(20):
    for bomb in (dimension_bomb(), *other_bombs().values()):
        for read in (read_image, image_size):
            try:
                read(bomb)
            except ImageError as error:
                assert error.reason == "too_large"
            else:
                raise AssertionError("a bomb was read")
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_row_08_a_hundred_bombs_take_no_memory(forks):
    """In another process, whose peak memory no other test has raised."""
    done = forks.run(IN_A_PROCESS_OF_ITS_OWN)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < BOMB_MEGABYTES * 1024  # KiB


def test_row_08_large_images_that_are_allowed_are_decoded_one_at_a_time(monkeypatch):
    """Four threads with a large image each: never are two of them in the decoder."""
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr("fastvae.data.images.read.LARGE_PIXELS", 100)
    inside, most = [], []
    real = ImageFile.ImageFile.load

    def load(self):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        try:
            return real(self)
        finally:
            inside.pop()

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: read_image(EVERY_KIND["png"]), range(8)))
    assert max(most) == 1


def test_row_09_no_interpreter_of_documents_is_ever_started(tmp_path, monkeypatch):
    """PostScript, PDF and FITS named as pictures: only plugins of the allow-list are imported."""
    (tmp_path / "in").mkdir()
    for number, (data, _) in enumerate(bad_images()):
        (tmp_path / "in" / f"{number}.jpg").write_bytes(data)
    picture(0).save(tmp_path / "in" / "good.png")
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"a process was started: {a}"))
    forbidden = [name for name in ("EpsImagePlugin", "PdfParser", "FitsImagePlugin") if f"PIL.{name}" in sys.modules]
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), max_failures="100%", **OPTIONS)
    assert report.ok == 1
    now = [name for name in ("EpsImagePlugin", "PdfParser", "FitsImagePlugin") if f"PIL.{name}" in sys.modules]
    assert now == forbidden


def test_row_10_first_frames_are_counted_in_the_report_or_their_files_left_out(tmp_path):
    (tmp_path / "in").mkdir()
    for image_format in ("GIF", "WEBP", "PNG"):
        frames = [picture(number, 32, 32) for number in range(3)]
        frames[0].save(tmp_path / "in" / f"a.{image_format.lower()}", save_all=True, append_images=frames[1:])
    report = encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), **OPTIONS)
    assert (report.ok, report.flags) == (3, {"first_frame": 3})
    picture(9, 32, 32).save(tmp_path / "in" / "still.png")
    report = encode(tmp_path / "in", tmp_path / "skipped", vae=small_vae(), animated="skip", max_failures=0, **OPTIONS)
    assert (report.ok, report.reasons, report.exceeded) == (1, {"animated": 3}, False)
    with pytest.raises(IdentityMismatch, match=r'preprocess\.frames: the store has "first", this run "skip"'):
        encode(tmp_path / "in", tmp_path / "out", vae=small_vae(), animated="skip", **OPTIONS)


def test_row_11_needles_specks_and_slivers_end_as_a_row_or_a_reason(tmp_path):
    """Real files of extreme sizes, through the whole run with two tables of buckets."""
    sizes = [(1, 4096), (4096, 1), (1, 1), (7, 7), (8, 8), (7, 8), (8, 256), (8, 257), (256, 8), (257, 8), (9, 9)]
    (tmp_path / "in").mkdir()
    for width, height in sizes:
        Image.new("RGB", (width, height), (9, 99, 199)).save(tmp_path / "in" / f"{width}x{height}.png")
    wanted = {}
    for width, height in sizes:
        if min(width, height) < 8:
            wanted[f"{width}x{height}.png"] = "too_small"
        elif max(width, height) > 32 * min(width, height):
            wanted[f"{width}x{height}.png"] = "too_thin"
    for number, buckets in enumerate((SIDE, "sdxl@64")):
        out = tmp_path / f"out{number}"
        report = encode(tmp_path / "in", out, vae=small_vae(), **OPTIONS | {"buckets": buckets, "max_failures": "100%"})
        assert failures(out) == wanted
        assert len(committed(out)) == report.ok == len(sizes) - len(wanted)


def test_the_corpus_has_the_reason_of_every_bad_image():
    """The table's figures depend on the reasons in the corpus: reading each file alone gives its reason."""
    for data, reason in bad_images():
        with pytest.raises(ImageError) as caught:
            read_image(data)
        assert caught.value.reason == reason
