"""The memory of decoded pictures: room is given out once, comes back, and nobody waits for ever."""

import threading

import numpy as np
import pytest
from PIL import Image
from support.small_store import picture

from fastvae.data.images.on_device import picture_buffer
from fastvae.data.images.on_device.picture_buffer import PictureBuffer


def buffer_of(pictures: int, size: int = 3 * 8 * 8) -> PictureBuffer:
    """Return a buffer with room for ``pictures`` of 8 x 8 pixels."""
    return PictureBuffer(np.zeros(pictures * size, np.uint8))


@pytest.mark.parametrize("band", [1, 100, 10**6], ids=["a line at a time", "bands that do not divide", "whole"])
def test_pixels_are_those_of_the_image(monkeypatch, band):
    monkeypatch.setattr(picture_buffer, "BAND_BYTES", band)
    image = picture(1, 13, 11)
    buffer = PictureBuffer(np.zeros(8 * 3 * 13 * 11, np.uint8))
    buffer.put(picture(2, 13, 11))
    kept = buffer.put(image)
    assert kept.size == (11, 13)
    assert buffer.pixels(kept).tobytes() == image.tobytes()


def test_pictures_do_not_overlap_and_room_is_used_again():
    random = np.random.default_rng(0)
    buffer, kept = PictureBuffer(np.zeros(4000, np.uint8)), {}
    for number in range(300):
        image = picture(number, *(int(side) for side in random.integers(1, 12, 2)))
        if (raw := buffer.put(image)) is None:
            gone = [*kept][:: 1 + number % 3]
            buffer.free(gone)
            kept = {raw: image for raw, image in kept.items() if raw not in gone}
        else:
            kept[raw] = image
        assert all(buffer.pixels(raw).tobytes() == image.tobytes() for raw, image in kept.items())
    buffer.free(kept)
    assert buffer._used == []


def test_a_large_picture_is_not_taken():
    buffer = buffer_of(4)
    assert buffer.put(picture(0, 8, 9), turn=5) is None  # not even after a wait
    assert buffer.put(picture(0, 8, 8), turn=5) is not None


def test_a_later_turn_waits_for_room_and_the_awaited_one_does_not():
    buffer, found = buffer_of(4), []
    kept = [buffer.put(picture(number, 8, 8), turn=1) for number in range(4)]
    thread = threading.Thread(target=lambda: found.append(buffer.put(picture(9, 8, 8), turn=1)))
    thread.start()
    assert buffer.put(picture(9, 8, 8), turn=0) is None
    thread.join(0.05)
    assert thread.is_alive()
    buffer.free(kept[2:3])
    thread.join(60)
    assert found == kept[2:3]  # the same place


@pytest.mark.parametrize("end", [lambda b: b.close(), lambda b: b.await_turn(1)], ids=["its end", "its turn"])
def test_a_wait_for_room_ends_with(end):
    buffer, found = buffer_of(4), []
    for number in range(4):
        buffer.put(picture(number, 8, 8))
    thread = threading.Thread(target=lambda: found.append(buffer.put(picture(9, 8, 8), turn=1)))
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    end(buffer)
    thread.join(60)
    assert found == [None]


def test_a_closed_buffer_takes_nothing_until_it_is_opened():
    buffer = buffer_of(4)
    buffer.put(picture(0, 8, 8))
    buffer.close()
    assert buffer.put(picture(0, 8, 8)) is None
    buffer.open()
    assert buffer.put(picture(0, 8, 8)).offset == 0


def test_a_picture_that_cannot_be_copied_gives_its_room_back():
    buffer = buffer_of(4)
    with pytest.raises(ValueError, match="broadcast"):
        buffer.put(Image.new("CMYK", (8, 8)))
    assert buffer._used == []
