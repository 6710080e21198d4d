"""Export as latent caches for kohya's sd-scripts, one .npz beside each image."""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from fastvae.checkpoints.presets import PRESETS
from fastvae.data.exporting.writer import Writer


@dataclass(frozen=True)
class Family:
    """Cache layout of a model family in sd-scripts, and the latents that its trainer takes.

    scaled, or raw; several_sizes: the latents' size is in the array names. channels, scaling_factor, shift_factor: of
    the family's latents.
    """

    scaled: bool
    several_sizes: bool
    channels: int
    scaling_factor: float
    shift_factor: float = 0.0


# Numbers: fastvae.checkpoints.PRESETS.
FAMILIES = {
    "sd": Family(False, False, 4, 0.18215),
    "sdxl": Family(False, False, 4, 0.13025),
    "sd3": Family(False, True, 16, 1.5305, 0.0609),
    "flux": Family(True, True, 16, 0.3611, 0.1159),
}
# Family of a store of 4 channels whose scaling is none of these: version 0.1.0 wrote its name for every store.
UNKNOWN_FAMILY = "sdxl"


def family_of(channels: int, scaling: dict[str, Any], given: str | None) -> tuple[str, str | None]:
    """Return the family of a store's latents, and a note if its scaling is that of no known model.

    given: the family that the caller names. Raises ValueError if the latents are those of another family, or of no
    family, or do not decide a family.
    """
    described = f"latents of {channels} channels, {_described(scaling)}"
    fitting = [name for name, family in FAMILIES.items() if family.channels == channels]
    found = next((name for name in fitting if _is_scaled_as(scaling, vars(FAMILIES[name]))), None)
    if not fitting or scaling.get("batch_norm") or (found is None and (model := _known_model(channels, scaling))):
        whose = f" (those of {model})" if fitting and not scaling.get("batch_norm") else ""
        raise ValueError(f"to must be another than npz-kohya: no family of sd-scripts has {described}{whose}")
    choice = repr(found) if found else " or ".join(map(repr, fitting))
    if given not in (None, found) and (found or given not in fitting):
        raise ValueError(f"family must be {choice} for {described}, got {given!r}")
    if found is not None:
        return found, None
    if given is None and UNKNOWN_FAMILY not in fitting:
        raise ValueError(f"family must be given for {described}: {choice}")
    family = given or UNKNOWN_FAMILY
    return family, f"{described}, exported as {family}'s, which have {_described(vars(FAMILIES[family]))}"


def _is_scaled_as(scaling: Mapping[str, Any], numbers: Mapping[str, Any]) -> bool:
    same = (
        math.isclose(scaling.get(name) or 0.0, numbers.get(name) or 0.0, rel_tol=1e-4)
        for name in ("scaling_factor", "shift_factor")
    )
    return all(same) and bool(scaling.get("latents_mean")) == bool(numbers.get("latents_mean"))


def _known_model(channels: int, scaling: Mapping[str, Any]) -> str | None:
    """Return the name of the known model whose latents these are."""
    for preset in PRESETS.values():
        if preset.config["latent_channels"] == channels and _is_scaled_as(scaling, preset.config):
            return preset.models
    return None


def _described(scaling: Mapping[str, Any]) -> str:
    shift = scaling.get("shift_factor")
    statistics = ", latents_mean" if scaling.get("latents_mean") else ""
    return f"scaling_factor {scaling.get('scaling_factor')}" + (f", shift_factor {shift}" if shift else "") + statistics


class Kohya(Writer):
    """NAME_WIDTHxHEIGHT_FAMILY.npz in the folder of each image's key, as sd-scripts' load_latents_from_disk reads it.

    fp32 ``latents`` [L, h, w], ``original_size`` (width, height), ``crop_ltrb``, and ``latents_flipped`` for variant 1
    of a store with mirrored rows; for SD3 and FLUX each name ends in _HxW of the latents. For a store with masks also
    ``alpha_mask``, fp32 from 0 to 1, at the bucket's size in pixels, which the trainer mirrors itself.
    """

    def __init__(self, folder: Path, family: str, flip: bool, clashes: dict[Path, list[str]]):
        """clashes: filled with the keys of each file that several images share, which is not written."""
        super().__init__(folder)
        self._flip, self._clashes = flip, clashes
        self._family, self._layout = family, FAMILIES[family]
        self._written: dict[Path, str] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Write one image's file, or add its mirrored latent; raises ValueError for a key that is no relative path."""
        height, width = row["original_hw"]
        key = _relative(row["key"])
        path = self.folder / key.with_name(f"{key.stem}_{width:04d}x{height:04d}_{self._family}.npz")
        values = row["latents" if "latents" in row else "mean"].astype(np.float32)
        ending = "_{}x{}".format(*values.shape[-2:]) if self._layout.several_sizes else ""
        if self._is_shared(path, row["key"]):
            return
        if row["variant"] > int(self._flip):
            raise ValueError(f"to must be another than npz-kohya, which holds one crop: {row['key']} has several")
        if row["variant"] == 1:
            if self._written.get(path) != row["key"]:
                raise ValueError(f"to must be another than npz-kohya: {row['key']} has only a mirrored row")
            with np.load(path) as cache:
                arrays = {name: cache[name] for name in cache.files}
            arrays[f"latents_flipped{ending}"] = values
        else:
            arrays = {f"latents{ending}": values, f"original_size{ending}": np.array([width, height])}
            arrays[f"crop_ltrb{ending}"] = np.array(crop_ltrb((width, height), tuple(row["bucket"][::-1])))
            if "alpha" in row:
                arrays[f"alpha_mask{ending}"] = alpha_mask(row["alpha"], row["bucket"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_npz(path, arrays)
        self._written[path] = row["key"]

    def _is_shared(self, path: Path, key: str) -> bool:
        """Return True, and delete the file, if another image has the same one: the trainer would take it for both."""
        clashes = self._clashes
        if path not in clashes and self._written.get(path, key) != key:
            clashes[path] = [self._written[path]]
            path.unlink()
        if path in clashes and key not in clashes[path]:
            clashes[path].append(key)
        return path in clashes


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
