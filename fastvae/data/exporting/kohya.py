"""Export as latent caches for kohya's sd-scripts, one .npz beside each image."""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvae.data.exporting.writer import Writer


@dataclass(frozen=True)
class Family:
    """Cache layout of a model family in sd-scripts: scaled or raw, and with the latents' size in array names or not."""

    scaled: bool
    several_sizes: bool


FAMILIES = {
    "sd": Family(scaled=False, several_sizes=False),
    "sdxl": Family(scaled=False, several_sizes=False),
    "sd3": Family(scaled=False, several_sizes=True),
    "flux": Family(scaled=True, several_sizes=True),
}


class Kohya(Writer):
    """NAME_WIDTHxHEIGHT_FAMILY.npz in the folder of each image's key, as sd-scripts' load_latents_from_disk reads it.

    fp32 ``latents`` [L, h, w], ``original_size`` (width, height), ``crop_ltrb``, and ``latents_flipped`` for variant 1
    of a store with mirrored rows; for SD3 and FLUX each name ends in _HxW of the latents. For a store with masks also
    ``alpha_mask``, fp32 from 0 to 1, at the bucket's size in pixels, which the trainer mirrors itself.
    """

    def __init__(self, folder: Path, family: str, flip: bool):
        super().__init__(folder)
        self._flip = flip
        self._family, self._layout = family, FAMILIES[family]
        self._written: dict[Path, str] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Write one image's file, or add its mirrored latent; raises ValueError for a key that is no relative path."""
        height, width = row["original_hw"]
        key = _relative(row["key"])
        path = self.folder / key.with_name(f"{key.stem}_{width:04d}x{height:04d}_{self._family}.npz")
        values = row["latents" if "latents" in row else "mean"].astype(np.float32)
        ending = "_{}x{}".format(*values.shape[-2:]) if self._layout.several_sizes else ""
        if row["variant"] > int(self._flip):
            raise ValueError(f"to must be another than npz-kohya, which holds one crop: {row['key']} has several")
        if row["variant"] == 1:
            if self._written.get(path) != row["key"]:
                raise ValueError(f"to must be another than npz-kohya: {row['key']} has only a mirrored row")
            with np.load(path) as cache:
                arrays = {name: cache[name] for name in cache.files}
            arrays[f"latents_flipped{ending}"] = values
        elif path in self._written:
            raise ValueError(f"{self._written[path]} and {row['key']} would share the file {path.name}: rename one")
        else:
            arrays = {f"latents{ending}": values, f"original_size{ending}": np.array([width, height])}
            arrays[f"crop_ltrb{ending}"] = np.array(crop_ltrb((width, height), tuple(row["bucket"][::-1])))
            if "alpha" in row:
                arrays[f"alpha_mask{ending}"] = alpha_mask(row["alpha"], row["bucket"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_npz(path, arrays)
        self._written[path] = row["key"]


def _write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write the same file as np.savez, but with deflated masks.

    Uncompressed masks have sixteen times the bytes of SDXL's latents: 4 MiB. Deflating to 47 KiB takes 7 ms on one core
    of an AMD EPYC; np.savez_compressed takes 80 ms a file.
    """
    with zipfile.ZipFile(path, "w") as file:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.save(content, array, allow_pickle=False)
            kind = zipfile.ZIP_DEFLATED if name.startswith("alpha_mask") else zipfile.ZIP_STORED
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), content.getvalue(), kind, 1)


def crop_ltrb(size: tuple[int, int], bucket: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return left, top, right, bottom of the whole picture, (width, height), fitted inside its bucket.

    sd-scripts stores these: its trainer takes left and top as the crop, and the bucket's width minus right as the left
    of a mirrored image.
    """
    aspect = size[0] / size[1]
    if bucket[0] / bucket[1] > aspect:
        width, height = bucket[1] * aspect, bucket[1]
    else:
        width, height = bucket[0], bucket[0] / aspect
    left, top = (bucket[0] - width) // 2, (bucket[1] - height) // 2
    return left, top, left + width, top + height


def alpha_mask(alpha: np.ndarray, bucket: list[int]) -> np.ndarray:
    """Return fp32 [H, W] from 0 to 1 for uint8 [h, w]: each latent's level at all of its pixels in ``bucket``, (H, W).

    sd-scripts stacks masks at that size, and weights its loss by their mean over each latent, which is this level.
    """
    down, across = (side // count for side, count in zip(bucket, alpha.shape, strict=True))
    return (alpha.astype(np.float32) / 255).repeat(down, 0).repeat(across, 1)


def _relative(key: str) -> PurePosixPath:
    """Return the key as a path inside a folder; raises ValueError for one outside it, or that no file can have."""
    path = PurePosixPath(key)
    if not path.name or path.is_absolute() or ".." in path.parts or re.search(r"[\x00-\x1f\x7f\\:]", key):
        raise ValueError(
            f"to must be another than npz-kohya: the key {key!r} is no relative path that any system takes"
        )
    return path
