"""Pixels: images of any kind to NCHW in [-1, 1], and bytes to PIL images."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.latents.autoencoder import Autoencoder, check_finite

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

# Floats with a larger magnitude are not images in [-1, 1]; resampling overshoots by less.
LARGEST_PIXEL = 1.5
PADS = ("error", "crop", "reflect")
# A picture without a negative value, with one from here to 1, is probably in [0, 1].
UNIT_RANGE = 0.5
_has_warned = False


def pixels_from_images(vae: Autoencoder, images: Any, *, layout: str = "auto", keep_bytes: bool = False) -> Tensor:
    """Return images as floats [B, C, H, W] in [-1, 1], on the device that they are on; errors as in encode_latents.

    keep_bytes: leave uint8 unchanged, for a caller that maps it to [-1, 1] later.
    """
    images = _as_tensor(images)
    channels = vae.config.in_channels
    images = _to_nchw(images, channels, layout)
    if images.dtype == torch.uint8:
        return images if keep_bytes else normalized(images)
    if not images.is_floating_point():
        raise ValueError(f"images must be uint8 or floating point, got {images.dtype}")
    check_finite("images", images, "as given")
    if images.numel():
        _check_range(*(bound.item() for bound in images.aminmax()))
    return images


def _check_range(least: float, largest: float) -> None:
    """Raise ValueError for floats outside [-1, 1]; warn, once in a process, for floats that seem to be in [0, 1]."""
    global _has_warned
    if (furthest := max(-least, largest)) > LARGEST_PIXEL:
        raise ValueError(
            f"images given as floats must lie in [-1, 1], got values up to {furthest:g}: "
            "give 0..255 as uint8, or divide by 127.5 and subtract 1"
        )
    if not _has_warned and least >= 0 and UNIT_RANGE <= largest <= 1:
        _has_warned = True
        warnings.warn(
            f"images given as floats are read as [-1, 1], and these lie in [{least:g}, {largest:g}]: if they are in "
            "[0, 1], multiply by 2 and subtract 1, or give uint8",
            stacklevel=2,
        )


def normalized(pixels: Tensor) -> Tensor:
    """Return uint8 pixels of any shape, [...] in 0..255, as fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def _as_tensor(images: Any) -> Tensor:
    if isinstance(images, Tensor):
        return images
    if hasattr(images, "__array_interface__") and not hasattr(images, "convert"):
        return _from_array(images)
    pictures = [images] if hasattr(images, "convert") else list(images)
    if not pictures:
        raise ValueError("images must be a batch, got an empty list: give an empty tensor [0, C, H, W] for no images")
    if not all(hasattr(picture, "convert") for picture in pictures):
        raise ValueError(f"images must be a tensor, an array or PIL images, got {described(pictures[0])} in a list")
    return _from_pil(pictures)


def _from_array(array: np.ndarray) -> Tensor:
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise ValueError(f"images must be uint8 or floating point, got an array of {array.dtype}")
    # torch takes neither negative strides nor foreign byte orders, and warns about read-only memory.
    plain = array.astype(array.dtype.newbyteorder("="), order="C", copy=not array.flags.writeable)
    return torch.from_numpy(plain)


def _from_pil(pictures: list[Image.Image]) -> Tensor:
    import numpy as np  # here: only PIL images need it

    sizes = {picture.size for picture in pictures}
    modes = {picture.mode for picture in pictures}
    if len(sizes) > 1:
        raise ValueError(f"images in a list must have one size, got {sorted(sizes)} as (width, height)")
    if not modes <= {"RGB", "L"} or len(modes) > 1:
        raise ValueError(f"PIL images must all be RGB or all be L (8 bits), got {sorted(modes)}: convert them first")
    stacked = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return stacked[:, None] if stacked.ndim == 3 else stacked.permute(0, 3, 1, 2)


def _to_nchw(images: Tensor, channels: int, layout: str) -> Tensor:
    if layout not in ("auto", "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'auto', 'NCHW' or 'NHWC', got {layout!r}")
    if images.ndim != 4:
        raise ValueError(f"images must have 4 dimensions, [B, C, H, W] or [B, H, W, C], got {described(images)}")
    first, last = images.shape[1] == channels, images.shape[3] == channels
    if layout == "auto" and first and last:
        raise ValueError(f"images of shape {tuple(images.shape)} can be read both ways: say layout='NCHW' or 'NHWC'")
    if layout == "NHWC" or (layout == "auto" and last):
        images = images.permute(0, 3, 1, 2)
    if images.shape[1] != channels:
        raise ValueError(f"images must have {channels} channels, got {described(images)}")
    if 0 in images.shape[2:]:
        raise ValueError(f"images must have at least one pixel, got {described(images)}")
    return images


def fit_to_multiple(pixels: Tensor, multiple: int, pad: str) -> Tensor:
    """Return pixels [B, C, H, W] with sides that are multiples of ``multiple``; pad and errors as in encode_latents."""
    height, width = pixels.shape[2:]
    more = (-height % multiple, -width % multiple)
    if pad not in PADS:
        raise ValueError(f"pad must be 'error', 'crop' or 'reflect', got {pad!r}")
    if more == (0, 0):
        return pixels
    if pad == "error":
        raise ValueError(
            f"height and width must be multiples of {multiple}, got {height} x {width}: say pad='crop' or pad='reflect'"
        )
    if pad == "crop":
        if min(height, width) < multiple:
            raise ValueError(f"an image of {height} x {width} cannot be cropped to multiples of {multiple}")
        return pixels[:, :, : height - height % multiple, : width - width % multiple]
    if pixels.shape[0] == 0:
        return pixels.new_empty(0, pixels.shape[1], height + more[0], width + more[1])
    if more[0] >= height or more[1] >= width:
        raise ValueError(f"an image of {height} x {width} is too small to be reflected up to multiples of {multiple}")
    pixels = normalized(pixels) if pixels.dtype == torch.uint8 else pixels  # torch's reflection takes no uint8
    return F.pad(pixels, (0, more[1], 0, more[0]), mode="reflect")


def pil_from_bytes(images: Tensor) -> list[Image.Image]:
    """Return uint8 images [B, C, H, W] as PIL images. Raises ValueError unless they have 1, 3 or 4 channels."""
    from PIL import Image

    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    if arrays.shape[3] not in (1, 3, 4):
        raise ValueError(f"output='pil' needs 1, 3 or 4 channels, got {arrays.shape[3]}: take output='uint8'")
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]


def described(value: Any) -> str:
    """Return the shape of a tensor, or the type of another value, for messages."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    return f"a {type(value).__module__}.{type(value).__name__}"
