"""Cases of the comparison with other libraries: random samples, and the documented rules of their colours."""

import importlib.util
import random
from dataclasses import dataclass, field

import numpy as np

HAS_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
HAS_OPENCV = importlib.util.find_spec("cv2") is not None
if HAS_IMAGECODECS:
    import imagecodecs

SIDES = (8, 9, 15, 16, 17, 24, 33, 40, 63, 64)
RELATIVE, BLACK_POINT_COMPENSATION = 1, 0x2000


@dataclass
class Case:
    """An encoded image, its pixels by the second reader, uint8 [H, W, 3] over white, and what it is made of."""

    kind: str
    options: dict = field(default_factory=dict)
    data: bytes = b""
    expected: np.ndarray | None = None


def smooth(rng: random.Random, channels: int, deep: bool) -> np.ndarray:
    """Return samples [H, W, channels], uint8 or uint16: ramps and waves with a little noise."""
    generator = np.random.default_rng(rng.randrange(2**32))
    height, width = rng.choice(SIDES), rng.choice(SIDES)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    planes = [
        np.sin(generator.uniform(0, 0.4) * x + generator.uniform(0, 0.4) * y + generator.uniform(0, 6)) * 0.4
        + 0.5
        + generator.uniform(-0.05, 0.05, x.shape)
        for _ in range(channels)
    ]
    most = 65535 if deep else 255
    return np.clip(np.stack(planes, -1) * most, 0, most).round().astype(np.uint16 if deep else np.uint8)


def eight_bit(samples: np.ndarray, grey: bool = False) -> np.ndarray:
    """Return uint8 samples by the documented rules: grey rounded, colours by their high byte."""
    if samples.dtype == np.uint8:
        return samples
    return ((samples.astype(np.uint32) + 128) // 257 if grey else samples >> 8).astype(np.uint8)


def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """Return uint8 colours [H, W, 3] of uint8 opacity [H, W] over white."""
    share = opacity[..., None] / 255
    return (colours * share + 255 * (1 - share)).round().astype(np.uint8)


def rgb_of(samples: np.ndarray) -> np.ndarray:
    """Return RGB over white of samples [H, W] or [H, W, 1 to 4]: grey, grey and opacity, RGB, RGB and opacity."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    channels = samples.shape[-1]
    grey = channels < 3
    colours = eight_bit(samples[..., :1] if grey else samples[..., :3], grey)
    colours = colours.repeat(3, -1) if grey else colours
    return colours if channels in (1, 3) else over_white(colours, eight_bit(samples[..., -1]))


def cmyk_to_rgb(samples: np.ndarray) -> np.ndarray:
    """Return RGB of uint8 or uint16 CMYK [H, W, 4], 255 for full ink: Pillow's rule."""
    inks = 255 - eight_bit(samples).astype(np.float64)
    return (inks[..., :3] * inks[..., 3:] / 255).round().astype(np.uint8)


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Return pixels [H, W, 3] rotated by an EXIF orientation, 1 to 8."""
    turned = pixels.transpose(1, 0, 2) if orientation >= 5 else pixels
    if orientation in (2, 3, 6, 7):
        turned = turned[:, ::-1]
    return turned[::-1] if orientation in (3, 4, 7, 8) else turned


def bgr(samples: np.ndarray) -> np.ndarray:
    """Return samples with red and blue exchanged, for OpenCV."""
    if samples.ndim == 2 or samples.shape[-1] == 1:
        return samples
    return np.ascontiguousarray(samples[..., [2, 1, 0, 3][: samples.shape[-1]]])


def profile_of(grey: bool) -> bytes:
    """Return the profile of Adobe RGB, or of a grey of gamma 1.8."""
    return imagecodecs.cms_profile("gray", gamma=1.8) if grey else imagecodecs.cms_profile("adobergb")


def to_srgb(rgb: np.ndarray, profile: bytes, grey: bool) -> np.ndarray:
    """Return uint8 RGB [H, W, 3] in sRGB, converted by imagecodecs' own copy of LittleCMS."""
    return imagecodecs.cms_transform(
        np.ascontiguousarray(rgb[..., 0]) if grey else rgb,
        profile,
        imagecodecs.cms_profile("srgb"),
        colorspace="gray" if grey else "rgb",
        outcolorspace="rgb",
        intent=RELATIVE,
        flags=BLACK_POINT_COMPENSATION,
    )
