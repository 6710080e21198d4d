"""Pictures, crops of them, and Pillow's bytes for a crop."""

import pytest
import torch
from fastvae_kernels.resize import Crop


def pillow_bytes(picture, crop, size):
    """Return what Pillow's resize, mirror and crop make of a picture, uint8 [height, width, 3]."""
    image = pytest.importorskip("PIL.Image", reason="the bytes are Pillow's")
    numpy = pytest.importorskip("numpy")
    scaled = image.fromarray(picture.cpu().numpy()).resize(crop.scaled[::-1], image.Resampling.LANCZOS, box=crop.box)
    if crop.mirrored:
        scaled = scaled.transpose(image.Transpose.FLIP_LEFT_RIGHT)
    top, left = crop.corner
    return torch.from_numpy(numpy.array(scaled.crop((left, top, left + size[1], top + size[0]))))


def random_picture(height, width, seed):
    """Return noise on the CPU: of all values for an even seed, of black and white, which overshoot, for an odd one."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8, device="cpu")
    return (values > 127).to(torch.uint8) * 255 if seed % 2 else values


def random_crop(draw, most):
    """Return a crop of a picture up to ``most`` pixels a side, every other time with a box, and the crop's size."""
    height, width, *scaled = (draw.randint(8, most) for _ in range(4))
    if draw.random() < 0.1:
        scaled = [height, width]
    box = None
    if draw.random() < 0.5:
        left, top = draw.uniform(0, width - 2), draw.uniform(0, height - 2)
        box = left, top, draw.uniform(left + 1, width), draw.uniform(top + 1, height)
    size = draw.randint(1, scaled[0]), draw.randint(1, scaled[1])
    corner = draw.randint(0, scaled[0] - size[0]), draw.randint(0, scaled[1] - size[1])
    return Crop(0, (height, width), tuple(scaled), corner, draw.random() < 0.5, box), size


def packed(pictures):
    """Return one buffer of pictures with odd gaps of 201 between them, and their offsets."""
    gap = torch.full((5,), 201, dtype=torch.uint8, device="cpu")
    offsets, length = [], 0
    for picture in pictures:
        offsets.append(length)
        length += picture.numel() + 5
    pieces = [part for picture in pictures for part in (picture.flatten(), gap)]
    return torch.cat(pieces).to(torch.get_default_device()), offsets
