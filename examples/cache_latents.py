"""Cache latents beside their pictures for kohya's sd-scripts, in the format of its ``--cache_latents_to_disk``.

    python examples/cache_latents.py photographs/ --vae path/to/vae --family sdxl --side 1024

One file a picture, NAME_WIDTHxHEIGHT_FAMILY.npz with the size of the picture, holds float32 ``latents`` [L, h, w],
``original_size`` (width, height) and ``crop_ltrb``, and with --flip ``latents_flipped``. For SD3 and FLUX.1 each name
ends in the size of the latents, _HxW, so that a file holds several resolutions. SD, SDXL and SD3 latents are raw;
FLUX.1's are scaled and shifted, as sd-scripts' code of that model returns them.

Buckets and crops follow the defaults of sd-scripts, and EXIF orientation is not applied, as there. The pixels differ in
the last bit (Pillow's Lanczos instead of OpenCV's), and the noise differs: here it depends on the picture's name only.
Pictures that cannot be read are skipped, named and counted; the next pictures are read while some are encoded.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import fastvae

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Families whose files hold several resolutions, and families whose latents are scaled.
SEVERAL_SIZES, SCALED = {"sd3", "flux"}, {"flux"}
Size = tuple[int, int]  # width, height
# Errors of Pillow for a file that is no picture, or that is broken or too large.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Planned:
    """A picture, its size and the size of its bucket."""

    path: Path
    size: Size
    bucket: Size

    def cache(self, family: str) -> Path:
        """Return the path of the cache."""
        width, height = self.size
        return self.path.with_name(f"{self.path.stem}_{width:04d}x{height:04d}_{family}.npz")


def bucket_sizes(side: int, step: int = 64, least: int = 256, most: int | None = None) -> list[Size]:
    """Return sizes of about side² pixels, with sides that are multiples of ``step`` from ``least`` to ``most``."""
    most = max(side, 1024) if most is None else most
    square = side // step * step
    sizes = {(square, square)}
    for one in range(least, most + 1, step):
        other = min(most, side * side // one // step * step)
        if other >= least:
            sizes |= {(one, other), (other, one)}
    return sorted(sizes)


def bucket_for(size: Size, sizes: list[Size]) -> Size:
    """Return the size itself if it is in ``sizes``, else the size of the nearest aspect ratio."""
    aspect = size[0] / size[1]
    return size if size in sizes else min(sizes, key=lambda bucket: abs(bucket[0] / bucket[1] - aspect))


def crop_ltrb(size: Size, bucket: Size) -> tuple[float, float, float, float]:
    """Return left, top, right and bottom of the complete picture, fitted inside its bucket."""
    aspect = size[0] / size[1]
    wider = bucket[0] / bucket[1] > aspect
    width, height = (bucket[1] * aspect, bucket[1]) if wider else (bucket[0], bucket[0] / aspect)
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def pixels_of(picture: Planned) -> Tensor:
    """Scale a picture to cover its bucket and crop the centre: uint8 [3, H, W]."""
    (width, height), (bucket_width, bucket_height) = picture.size, picture.bucket
    scale = max(bucket_width / width, bucket_height / height)
    covering = int(width * scale + 0.5), int(height * scale + 0.5)
    left, top = (covering[0] - bucket_width) // 2, (covering[1] - bucket_height) // 2
    with Image.open(picture.path) as image:
        scaled = image.convert("RGB").resize(covering, Image.Resampling.LANCZOS)
    cropped = scaled.crop((left, top, left + bucket_width, top + bucket_height))
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def plan(folder: Path, sizes: list[Size], skipped: list[Path]) -> list[Planned]:
    """List every picture under ``folder``, sorted by bucket; add those that cannot be read to ``skipped``.

    Those that differ only by extension are named and left out: their caches would have one name.
    """
    by_cache: dict[tuple[Path, Size], list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            try:
                with Image.open(path) as image:  # reads only the header
                    by_cache.setdefault((path.with_suffix(""), image.size), []).append(path)
            except UNREADABLE as error:
                skip(path, error, skipped)
    for paths in by_cache.values():
        if len(paths) > 1:
            print(f"left out: {', '.join(map(str, paths))} would share one cache: rename one")
    planned = [
        Planned(paths[0], size, bucket_for(size, sizes)) for (_, size), paths in by_cache.items() if len(paths) == 1
    ]
    return sorted(planned, key=lambda picture: picture.bucket)


def skip(path: Path, error: Exception, skipped: list[Path]) -> None:
    """Name a picture that cannot be read, and add it to ``skipped``."""
    print(f"skipped: {path}: {error}")
    skipped.append(path)


def batches(pictures: list[Planned], batch: int, flip: bool, skipped: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield batches of one bucket each, as LatentLoader takes them, with ``flip`` each a second time mirrored.

    The key of a picture decides its noise: its name, so that latents do not depend on batch and order.
    """
    for _, group in groupby(pictures, key=lambda picture: picture.bucket):
        rows: list[tuple[Planned, Tensor]] = []
        for picture in group:
            try:
                rows.append((picture, pixels_of(picture)))
            except UNREADABLE as error:
                skip(picture.path, error, skipped)
            if len(rows) == batch:
                yield from as_batches(rows, flip)
                rows = []
        if rows:
            yield from as_batches(rows, flip)


def as_batches(rows: list[tuple[Planned, Tensor]], flip: bool) -> Iterator[dict[str, Any]]:
    """Yield the batch of some pictures; with ``flip`` the mirrored one too, with the same noise."""
    pictures, pixels = [picture for picture, _ in rows], torch.stack([pixels for _, pixels in rows])
    names = [picture.path.name for picture in pictures]
    yield {"pictures": pictures, "images": pixels, "key": names, "name": "latents"}
    if flip:
        yield {"pictures": pictures, "images": pixels.flip(3), "key": names, "name": "latents_flipped"}


def write_cache(path: Path, values: dict[str, np.ndarray]) -> None:
    """Write a cache atomically, and keep its arrays of other resolutions."""
    held = {}
    if path.exists():
        with np.load(path) as file:
            held = dict(file)
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    with partial.open("wb") as file:
        np.savez(file, **{**held, **values})  # type: ignore[arg-type]
    partial.replace(path)


def is_cached(path: Path, names: list[str], size: tuple[int, int]) -> bool:
    """Return True if a cache has all of these arrays, the first with latents of this height and width."""
    if not path.exists():
        return False
    with np.load(path) as held:
        return set(names) <= set(held.files) and held[names[0]].shape[-2:] == size


def cache(
    vae: fastvae.AutoencoderKL,
    pictures: list[Planned],
    family: str,
    skipped: list[Path],
    *,
    batch: int,
    flip: bool = False,
    seed: int = 0,
) -> int:
    """Encode the pictures that have no cache yet, and return their number; add broken ones to ``skipped``."""
    done, f = 0, vae.downsample_factor

    def named(name: str, bucket: Size) -> str:
        return f"{name}_{bucket[1] // f}x{bucket[0] // f}" if family in SEVERAL_SIZES else name

    def is_missing(picture: Planned) -> bool:
        every = ("latents", "original_size", "crop_ltrb", *["latents_flipped"] * flip)
        names = [named(name, picture.bucket) for name in every]
        return not is_cached(picture.cache(family), names, (picture.bucket[1] // f, picture.bucket[0] // f))

    loader = batches(list(filter(is_missing, pictures)), batch, flip, skipped)
    for drawn in fastvae.LatentLoader(loader, vae, seed=seed, scaled=family in SCALED):
        for picture, latents in zip(drawn["pictures"], drawn["latents"].float().cpu().numpy(), strict=True):
            crop = crop_ltrb(picture.size, picture.bucket)
            values = {drawn["name"]: latents, "original_size": np.array(picture.size), "crop_ltrb": np.array(crop)}
            write_cache(picture.cache(family), {named(name, picture.bucket): values[name] for name in values})
            done += drawn["name"] == "latents"
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="a folder of pictures, read recursively")
    parser.add_argument("--vae", required=True, help="a directory or a Hub id")
    parser.add_argument("--family", choices=["sd", "sdxl", "sd3", "flux"], required=True)
    parser.add_argument("--side", type=int, default=1024, help="--resolution of sd-scripts")
    parser.add_argument("--step", type=int, default=64, help="its --bucket_reso_steps")
    parser.add_argument("--least", type=int, default=256, help="its --min_bucket_reso")
    parser.add_argument("--most", type=int, help="its --max_bucket_reso; default: 1024, or the side if larger")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--flip", action="store_true", help="also cache mirrored pictures, for its --flip_aug")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = bucket_sizes(arguments.side, arguments.step, arguments.least, arguments.most)
    cuda = torch.cuda.is_available()
    skipped: list[Path] = []
    try:
        pictures = plan(arguments.photographs, sizes, skipped)
        if not pictures:
            parser.error(f"there is no picture ({', '.join(sorted(SUFFIXES))}) under {arguments.photographs}")
        vae = fastvae.AutoencoderKL.from_pretrained(
            arguments.vae,
            torch_dtype=torch.float16 if cuda else torch.float32,
            device="cuda" if cuda else "cpu",
            parts=("encoder",),
        )
    except (OSError, ValueError) as error:  # no model
        parser.error(str(error))
    fastvae.accelerate(vae, freeze=True)
    options = {"batch": arguments.batch, "flip": arguments.flip, "seed": arguments.seed}
    done = cache(vae, pictures, arguments.family, skipped, **options)
    buckets = len({picture.bucket for picture in pictures})
    print(f"{done} of {len(pictures)} pictures encoded, in {buckets} buckets; {len(skipped)} skipped")


if __name__ == "__main__":
    main()
