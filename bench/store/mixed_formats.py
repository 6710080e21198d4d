"""Photographs in every image format that is read: every other file is converted, the others are copied."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

PHOTOGRAPHS = {".jpg", ".jpeg", ".png", ".webp"}
# Longest side of converted pictures, so that a folder of them is written in a minute.
LONGEST = 1600
# Two files show one photograph if they differ by less at 16x16, in levels of 255.
ALIKE = 8
ORIENTATION = 0x0112
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@dataclass(frozen=True)
class Form:
    """A format. write: saves a picture; seen: returns the picture that a viewer shows of the file."""

    suffix: str
    write: Callable[[Image.Image, Path], None]
    seen: Callable[[Image.Image], Image.Image] = lambda picture: picture


def rotated_jpeg(picture: Image.Image, path: Path) -> None:
    """Write a rotated JPEG with the EXIF orientation that a phone sets."""
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(path, quality=92, exif=exif)


def grey(picture: Image.Image) -> Image.Image:
    return picture.convert("L").convert("RGB")


def grey_in_16_bits(picture: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path)


def _opacity(picture: Image.Image) -> Image.Image:
    """Return an alpha channel that is 0 in one corner, a quarter of each side, and 255 elsewhere."""
    opacity = np.full((picture.height, picture.width), 255, np.uint8)
    opacity[: picture.height // 4, : picture.width // 4] = 0
    return Image.fromarray(opacity)


def transparent_corner(picture: Image.Image, path: Path) -> None:
    picture = picture.copy()
    picture.putalpha(_opacity(picture))
    picture.save(path)


def white_corner(picture: Image.Image) -> Image.Image:
    return Image.composite(picture, Image.new("RGB", picture.size, "white"), _opacity(picture))


FORMS = {
    "JPEG rotated by EXIF": Form(".jpg", rotated_jpeg),
    "JPEG in CMYK": Form(".jpg", lambda picture, path: picture.convert("CMYK").save(path, quality=95)),
    "JPEG with an ICC profile": Form(".jpeg", lambda picture, path: picture.save(path, quality=90, icc_profile=SRGB)),
    "progressive JPEG, grey": Form(
        ".jpg", lambda picture, path: picture.convert("L").save(path, progressive=True), grey
    ),
    "PNG, grey in 16 bits": Form(".png", grey_in_16_bits, grey),
    "PNG with transparency": Form(".png", transparent_corner, white_corner),
    "PNG with a palette": Form(".png", lambda picture, path: picture.quantize(256).save(path)),
    "WebP": Form(".webp", lambda picture, path: picture.save(path, quality=90)),
    "AVIF": Form(".avif", lambda picture, path: picture.save(path, quality=85)),
    "TIFF": Form(".tif", lambda picture, path: picture.save(path, compression="tiff_lzw")),
    "BMP": Form(".bmp", lambda picture, path: picture.save(path)),
    "GIF": Form(".gif", lambda picture, path: picture.quantize(256).save(path)),
}


def photographs_in(folder: Path, count: int) -> list[Path]:
    """Return ``count`` photographs, evenly chosen from ``folder``; one that has several files or sizes comes once."""
    found = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PHOTOGRAPHS and path.is_file()]
    paths: list[Path] = []
    looks = np.empty((0, 16 * 16 * 3))
    for path in dict.fromkeys(path.resolve() for path in found):
        look = np.asarray(plain(path, 128).resize((16, 16)), np.float64).reshape(1, -1)
        if (np.abs(looks - look).mean(axis=1) > ALIKE).all():
            paths, looks = [*paths, path], np.concatenate([looks, look])
    if not paths:
        raise SystemExit(f"{folder} must hold photographs ({', '.join(sorted(PHOTOGRAPHS))}), it holds none")
    return [paths[number] for number in sorted({len(paths) * number // count for number in range(count)})]


def write_mixed(photographs: Iterable[Path], folder: Path) -> dict[str, tuple[Path, str]]:
    """Write the photographs into ``folder``, every other one in one of FORMS; return key -> (original, form).

    The key is the path in ``folder``. Suffixes are those that cameras and browsers write.
    """
    made, forms = {}, list(FORMS)
    for number, path in enumerate(photographs):
        if number % 2:
            form = forms[number // 2 % len(forms)]
            suffix = FORMS[form].suffix
        else:
            form, suffix = f"{path.suffix[1:].upper()}, unchanged", path.suffix.lower()
        key = f"{number // 25}/{number:03}{suffix}"
        target = folder / key
        target.parent.mkdir(parents=True, exist_ok=True)
        if form in FORMS:
            FORMS[form].write(plain(path, LONGEST), target)
        else:
            shutil.copyfile(path, target)
        made[key] = path, form
    return made


def as_seen(path: Path, form: str, longest: int) -> Image.Image:
    """Return the picture that the file shows which write_mixed made of the photograph at ``path``."""
    picture = plain(path, longest)
    return FORMS[form].seen(picture) if form in FORMS else picture


def plain(path: Path, longest: int) -> Image.Image:
    """Return a photograph as a viewer shows it: upright RGB over white, at most ``longest`` pixels a side."""
    with Image.open(path) as opened:
        opened.draft("RGB", (longest, longest))
        upright = ImageOps.exif_transpose(opened)
    if upright.mode in ("RGBA", "LA", "P", "PA"):
        upright = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    upright = upright.convert("RGB")
    upright.thumbnail((longest, longest), Image.Resampling.LANCZOS)
    return upright
