"""DeviceResize: batches of a bucket from decoded pictures, which a device scales to Pillow's bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import PIL
import torch
from fastvae_kernels.resize import Crop, Tables, plan, resize_lanczos
from fastvae_kernels.shared.runtime import KERNEL_DEVICES
from torch import Tensor

from fastvae.data.images.crop import Placement, cropped
from fastvae.data.images.on_device.picture_buffer import PictureBuffer, RawCrop, RawPicture
from fastvae.data.rows import Size

# Pinned memory of the pictures that wait: 16 of 1080p, as a JPEG is decoded for a bucket of 512 pixels, are 25 MB.
BUFFER_BYTES = 256 * 2**20
PILLOW = int(PIL.__version__.split(".", 1)[0])
# A picture whose device's bytes are compared with Pillow's: its size, and crops of it, one enlarged and mirrored.
CHECKED_SIZE = (61, 47)
CHECKED = (
    Placement((40, 31), (3, 1), False, (32, 24)),
    Placement((70, 90), (20, 60), True, (32, 24)),
    Placement((32, 47), (0, 11), True, (32, 24)),
)


class DeviceResize:
    """Pictures in a ``buffer`` to uint8 batches on ``device``, by the op resize_lanczos.

    On a CUDA GPU the buffer is pinned, and one stream copies and resizes while the stream that asks for the batch still
    computes the one before. Elsewhere the op runs where it is called.
    """

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES):
        self.device = device
        self._on_gpu = device.type == "cuda"
        self._memory = torch.empty(buffer_bytes, dtype=torch.uint8, device="cpu", pin_memory=self._on_gpu)
        self._stream = torch.cuda.Stream(device) if self._on_gpu else None
        self.buffer = PictureBuffer(self._memory.numpy())

    def batch(self, items: Sequence[np.ndarray | RawCrop]) -> Tensor:
        """Return uint8 [N, H, W, 3] on the device: the crops, and pixels that are finished, all of one size.

        The pictures must stay in the buffer until the batch is computed.
        """
        pieces, tables = self.layout(items)
        if self._stream is None:
            return resize_lanczos(self._gathered(pieces), *tables.to(self.device))
        pinned = tables._replace(**{name: getattr(tables, name).pin_memory() for name in ("rows", "blocks", "weights")})
        with torch.cuda.stream(self._stream):
            batch = resize_lanczos(self._gathered(pieces), *pinned.to(self.device, non_blocking=True))
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self._stream)
        batch.record_stream(computing)
        return batch

    def layout(self, items: Sequence[np.ndarray | RawCrop]) -> tuple[list[tuple[int, Tensor]], Tables]:
        """Return the bytes of a batch's pictures, each with its place behind the others, and the op's tables."""
        crops, pieces, size = _layout(items, self._memory)
        return pieces, plan(crops, size, PILLOW)

    def _gathered(self, pieces: list[tuple[int, Tensor]]) -> Tensor:
        start, last = pieces[-1]
        flat = torch.empty(start + last.numel(), dtype=torch.uint8, device=self.device)
        for at, piece in pieces:
            flat[at : at + piece.numel()].copy_(piece, non_blocking=True)
        return flat


def device_resize(device: torch.device) -> tuple[DeviceResize | None, str | None]:
    """Return what resizes on ``device``, None where Pillow does, and a sentence if that is a surprise."""
    if device.type != "cuda" or "cuda" not in KERNEL_DEVICES:
        return None, None
    resize = DeviceResize(device)
    if differing := differing_bytes(resize):
        return None, f"the resize on this {device.type} differs from Pillow's in {differing} bytes: Pillow resizes"
    return resize, None


def differing_bytes(resize: DeviceResize) -> int:
    """Return how many bytes of a noisy picture's crops the device and Pillow resize to different values."""
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 256, (*CHECKED_SIZE, 3), np.uint8)
    resize.buffer.open()
    picture = resize.buffer.put(Image.fromarray(noise))
    assert picture is not None, "the buffer has room for a picture of 9 kB"
    ours = resize.batch([RawCrop(picture, place) for place in CHECKED]).cpu().numpy()
    theirs = np.stack([np.asarray(cropped(Image.fromarray(noise), place)) for place in CHECKED])
    return int((ours != theirs).sum())


def _layout(items: Sequence[np.ndarray | RawCrop], memory: Tensor) -> tuple[list[Crop], list[tuple[int, Tensor]], Size]:
    """Return the crops of ``items``, the bytes that they read with their places one after another, and their size."""
    crops: list[Crop] = []
    pieces: list[tuple[int, Tensor]] = []
    places: dict[RawPicture, int] = {}
    size, end = (1, 1), 0
    for item in items:
        if isinstance(item, np.ndarray):
            size = item.shape[0], item.shape[1]
            crops.append(Crop(end, size, size))
            pieces.append((end, torch.from_numpy(np.ascontiguousarray(item)).flatten()))
            end += item.size
            continue
        picture, place = item.picture, item.place
        size = place.size
        if picture not in places:
            places[picture] = end
            count = 3 * picture.size[0] * picture.size[1]
            pieces.append((end, memory[picture.offset : picture.offset + count]))
            end += count
        crops.append(Crop(places[picture], picture.size, place.scaled_hw, place.corner, place.mirrored))
    return crops, pieces, size
