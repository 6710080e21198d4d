"""PictureBuffer: decoded pictures in one block of memory until a device has them. This module imports no torch."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastvae.data.rows import Size

if TYPE_CHECKING:
    from PIL import Image

    from fastvae.data.images.crop import Placement

# A picture of over this share of the memory is not taken, so that it does not keep all others out.
LARGEST_SHARE = 4
# Lines are copied in bands: a second copy of the whole picture would take its memory, and 24 megapixels are 72 MB.
BAND_BYTES = 4 * 2**20


@dataclass(frozen=True)
class RawPicture:
    """A picture in a PictureBuffer: its first byte there, and its (height, width). It has 3 bytes a pixel."""

    offset: int
    size: Size


@dataclass(frozen=True)
class RawCrop:
    """Pixels of one row, still to be made: a crop of a picture in a PictureBuffer."""

    picture: RawPicture
    place: Placement


class PictureBuffer:
    """Pictures in ``memory``, uint8 [bytes]: ``put`` by any thread, ``free`` once they were copied.

    Work comes in turns: all pictures of a turn are needed together, and turns in their order. A thread waits for room
    for the picture of a later turn than the one that is ``awaited``. That one's never wait, as those of later turns may
    fill the memory: where no room is left, the caller has to do without the buffer.
    """

    def __init__(self, memory: np.ndarray):
        self.memory = memory
        self._changed = threading.Condition()
        self._used: list[tuple[int, int]] = []  # (start, stop), in order
        self._awaited, self._closed = 0, False

    def open(self) -> None:
        """Begin at turn 0, without pictures."""
        with self._changed:
            self._used, self._awaited, self._closed = [], 0, False

    def close(self) -> None:
        """Take no more pictures, so that no thread waits."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def await_turn(self, turn: int) -> None:
        """Say that the pictures of this turn are the next that are needed."""
        with self._changed:
            self._awaited = turn
            self._changed.notify_all()

    def put(self, image: Image.Image, turn: int = 0) -> RawPicture | None:
        """Copy an RGB image; None if there is no room for it, and no wait for some."""
        size = 3 * image.width * image.height
        with self._changed:
            while (start := self._room(size)) is None:
                if self._closed or turn <= self._awaited or size > len(self.memory) // LARGEST_SHARE:
                    return None
                self._changed.wait()
            bisect.insort(self._used, (start, start + size))
        picture = RawPicture(start, (image.height, image.width))
        try:
            self._copy(image, picture)
        except BaseException:
            self.free([picture])
            raise
        return picture

    def pixels(self, picture: RawPicture) -> np.ndarray:
        """Return the bytes of a picture, a view of the memory."""
        return self.memory[picture.offset :][: 3 * picture.size[0] * picture.size[1]]

    def free(self, pictures: Iterable[RawPicture]) -> None:
        """Give the room of these pictures to others."""
        with self._changed:
            for picture in pictures:
                self._used.remove((picture.offset, picture.offset + 3 * picture.size[0] * picture.size[1]))
            self._changed.notify_all()

    def _room(self, size: int) -> int | None:
        """Return the first place with room for ``size`` bytes."""
        if self._closed or size > len(self.memory) // LARGEST_SHARE:
            return None
        start = 0
        for begin, end in self._used:
            if begin - start >= size:
                return start
            start = end
        return start if len(self.memory) - start >= size else None

    def _copy(self, image: Image.Image, picture: RawPicture) -> None:
        target = self.pixels(picture)
        lines = max(1, BAND_BYTES // (3 * image.width))
        for top in range(0, image.height, lines):
            whole = lines >= image.height
            band = image if whole else image.crop((0, top, image.width, min(image.height, top + lines)))
            data = band.tobytes()
            target[3 * image.width * top :][: len(data)] = np.frombuffer(data, np.uint8)
