"""The resize on the device: stores have the bytes of those that Pillow resized, whatever room its buffer has."""

import json
import threading
from types import SimpleNamespace

import fastvae_kernels.resize
import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from support.fake_gpu import pipeline_of_a_gpu
from support.small_store import picture, small_vae

import fastvae.data.encoding.pipeline
import fastvae.data.images.on_device.resize as on_device
from fastvae.data.encoding.encode import encode
from fastvae.data.encoding.image_reader import Chunk, ImageReader
from fastvae.data.encoding.pipeline import decoded_chunks
from fastvae.data.images.buckets import Buckets
from fastvae.data.images.crop import Variants
from fastvae.data.images.on_device.picture_buffer import RawCrop
from fastvae.data.images.on_device.resize import DeviceResize, device_resize, differing_bytes
from fastvae.data.sources.open import open_source
from fastvae.data.store.plan import PlannedRow, Unit

SIZES = ((48, 40), (40, 48), (97, 33), (32, 32), (24, 20), (61, 200), (130, 110))
OPTIONS = {"buckets": 32, "crop": "random", "variants": 2, "flip": True, "alpha": "mask", "seed": 3, "batch": 8}


@pytest.fixture(autouse=True)
def reference(monkeypatch):
    """The op's reference, which is much faster than its kernel in the interpreter; tests/ops compares the two."""
    monkeypatch.setattr(on_device, "resize_lanczos", fastvae_kernels.resize.reference)


@pytest.fixture
def photographs(tmp_path):
    """Pictures of several sizes: enlarged, of the bucket's size, rotated by EXIF, transparent, and one that is cut."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        picture(number, *size).save(folder / f"{number}.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(7, 70, 50).save(folder / "turned.jpg", exif=exif)
    transparent = picture(8, 50, 60).convert("RGBA")
    transparent.putalpha(picture(9, 50, 60).convert("L"))
    transparent.save(folder / "transparent.png")
    (folder / "cut.jpg").write_bytes((folder / "turned.jpg").read_bytes()[:-90])
    return folder


def encoded(source, out, **options):
    report = encode(source, out, vae=small_vae(), device="cpu", dtype="fp32", progress=False, **OPTIONS | options)
    return report, {path.name: path.read_bytes() for path in (out / "shards").glob("*.safetensors")}


@pytest.mark.parametrize(
    ("room", "on_the_device"),
    [(2**20, "all"), (40_000, "some"), (100, "none")],
    ids=["room for all", "pictures that find no room", "no room at all"],
)
def test_shards_are_equal_whichever_resizes(photographs, tmp_path, monkeypatch, room, on_the_device):
    report, by_pillow = encoded(photographs, tmp_path / "pillow")
    puts = []
    with pipeline_of_a_gpu(monkeypatch, room) as made:
        real = on_device.PictureBuffer.put
        monkeypatch.setattr(on_device.PictureBuffer, "put", lambda *a, **k: puts.append(real(*a, **k)) or puts[-1])
        other, by_device = encoded(photographs, tmp_path / "device")
    assert by_device == by_pillow
    assert len(by_pillow) > 0
    assert (report.ok, report.failed) == (other.ok, other.failed) == (9 * 4, 4)
    assert report.flags == other.flags
    assert len(puts) == 9  # each picture once for its four variants
    kept = sum(put is not None for put in puts)
    assert {"all": kept == 9, "some": 0 < kept < 9, "none": kept == 0}[on_the_device]
    assert all(isinstance(pixels, torch.Tensor) for pixels in made[0].inputs)
    assert made[1].buffer._used == []  # all room was given back


def test_a_batch_that_does_not_fit_is_resized_again_in_halves(photographs, tmp_path, monkeypatch):
    _, by_pillow = encoded(photographs, tmp_path / "pillow", batch=2)
    with pipeline_of_a_gpu(monkeypatch, 2**20, most=2):
        report, by_device = encoded(photographs, tmp_path / "device", batch=4)
    assert report.halved > 0
    assert {name: len(shard) for name, shard in by_device.items()} == {n: len(s) for n, s in by_pillow.items()}


def test_stores_of_both_ways_have_one_identity(photographs, tmp_path, monkeypatch):
    """A run on a CPU is continued on a GPU."""
    out = tmp_path / "out"
    encoded(photographs, out)
    picture(20, 90, 80).save(photographs / "new.png")
    with pipeline_of_a_gpu(monkeypatch, 2**20):
        report, _ = encoded(photographs, out)
    assert (report.ok, report.resumed) == (4, 9 * 4)
    assert "pillow" in json.loads((out / "store.json").read_text())["identity"]["preprocess"]["decoder"]


@pytest.fixture
def reader(photographs):
    return ImageReader(open_source(photographs), Buckets.parse(32, 8), Variants(), "white", 8, 10**6)


def units_of(reader, rows=2):
    files = reader.source.listing().files
    return [
        Chunk(Unit(0, (32, 32), tuple(map(PlannedRow, files))), tuple(map(PlannedRow, files[at : at + rows])), False)
        for at in range(0, len(files), rows)
    ]


def test_threads_that_wait_for_room_do_not_hold_up_the_batch_that_is_needed(reader):
    """Nothing is freed, so that every thread but those of the first batches finds the buffer full."""
    resize = DeviceResize(torch.device("cpu"), 4 * 3 * 48 * 40)
    chunks = decoded_chunks(iter(units_of(reader)), reader, resize, workers=3)
    done = list(chunks)
    assert sum(len(chunk.decoded) for chunk in done) == 9
    kinds = [isinstance(item.pixels, RawCrop) for chunk in done for item in chunk.decoded]
    assert True in kinds
    assert False in kinds


class Ended(BaseException):
    """Error of a test, which nothing catches."""


@pytest.mark.parametrize("error", [Ended(), KeyboardInterrupt()], ids=["an error", "an interruption"])
def test_an_end_leaves_no_thread_waiting_for_room(reader, monkeypatch, error):
    before = {*threading.enumerate()}
    resize = DeviceResize(torch.device("cpu"), 2 * 3 * 48 * 40)
    chunks = decoded_chunks(iter(units_of(reader)), reader, resize, workers=3)
    monkeypatch.setattr(fastvae.data.encoding.pipeline, "add_part", lambda *_: (_ for _ in ()).throw(error))
    with pytest.raises(type(error)):
        next(chunks)
    del chunks
    left = {*threading.enumerate()} - before
    assert not [thread for thread in left if thread.name.startswith("fastvae_")]


def test_a_decoders_error_leaves_no_thread_waiting_for_room(reader, monkeypatch):
    real = fastvae.data.encoding.pipeline.decode_chunk

    def failing(part, *arguments):
        if part.planned[0].file.key == "3.png":
            raise MemoryError("3.png")
        return real(part, *arguments)

    monkeypatch.setattr(fastvae.data.encoding.pipeline, "decode_chunk", failing)
    resize = DeviceResize(torch.device("cpu"), 2 * 3 * 48 * 40)
    with pytest.raises(MemoryError, match=r"3\.png"):
        list(decoded_chunks(iter(units_of(reader)), reader, resize, workers=3))


def test_a_device_with_other_bytes_than_pillow_is_not_used(monkeypatch):
    assert differing_bytes(DeviceResize(torch.device("cpu"), 2**20)) == 0
    cuda = SimpleNamespace(type="cuda")
    real = on_device.resize_lanczos

    def inexact(*arguments):
        pixels = real(*arguments)
        pixels[0, 0, 0, 0] ^= 1
        return pixels

    monkeypatch.setattr(on_device, "DeviceResize", lambda _: DeviceResize(torch.device("cpu"), 2**20))
    monkeypatch.setattr(on_device, "KERNEL_DEVICES", ("cuda",))
    assert device_resize(cuda)[0] is not None
    monkeypatch.setattr(on_device, "resize_lanczos", inexact)
    assert device_resize(cuda) == (None, "the resize on this cuda differs from Pillow's in 1 bytes: Pillow resizes")
    monkeypatch.setattr(on_device, "KERNEL_DEVICES", ())
    assert device_resize(cuda) == (None, None)


def test_finished_pixels_pass_unchanged():
    pixels = [np.full((4, 6, 3), value, np.uint8) for value in (1, 2)]
    batch = DeviceResize(torch.device("cpu"), 100).batch(pixels)
    assert np.array_equal(batch.numpy(), np.stack(pixels))


def test_a_picture_that_cannot_be_used_takes_no_room(reader):
    resize = DeviceResize(torch.device("cpu"), 2**20)
    (chunk,) = decoded_chunks(iter(units_of(reader, 20)), reader, resize, 2)
    assert [failure.key for failure in chunk.failures] == ["cut.jpg"]
    assert len(resize.buffer._used) == len(chunk.decoded) == 9


def test_the_thread_that_feeds_a_gpu_begins_no_parallel_region(photographs, tmp_path, monkeypatch):
    """Its operators would wait for cores that decode: 6.8 ms of CPU an image instead of 0.8, where all sizes differ."""
    seen, real, before = [], DeviceResize.batch, torch.get_num_threads()
    monkeypatch.setattr(DeviceResize, "batch", lambda *a: seen.append(torch.get_num_threads()) or real(*a))
    torch.set_num_threads(2)
    try:
        with pipeline_of_a_gpu(monkeypatch, 2**20):
            encoded(photographs, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert {*seen} == {1}


def test_a_store_of_another_pillow_is_continued_with_a_note(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(PIL, "__version__", "12.3.0")
    report, _ = encoded(photographs, tmp_path / "out")
    monkeypatch.undo()
    assert report.notes == []
    picture(20, 90, 80).save(photographs / "new.png")
    report, _ = encoded(photographs, tmp_path / "out")
    own = PIL.__version__.split(".")[0]
    (note,) = report.notes
    assert note.startswith(f"rows of this store were made under Pillow 12, and new ones are under Pillow {own}")
    assert encoded(photographs, tmp_path / "out")[0].notes == []  # nothing left to do
