"""A copy of a store that tests/golden keeps, and helpers of the tests that read it."""

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

import fastvae

STORES = Path(__file__).parent / "stores"
# The digest of each store's identity. None of them ever changes.
DIGESTS = {
    "folder": "bf8487b9991eed440291bc023eaf558474a54f497a69fb36211b9dd2fa827fb6",
    "tar": "bd9c64416beac02ecdf29d688ed6e71309f2c5c701855548158cb8c1dad3dfa7",
    "manifest": "b052adf9d0a6e942767536508be41d1a386732654c79ea91dee7d14db3fe5784",
    "mask": "f79e36f1705c098f77edaaa2eb8c8c198eb4151205542f1c12e95e93178f9a8b",
    "repaired": "fe57763c48b620d8db24e34e8c3eb35a4b173bdc0cc25689bc034b5fee3fbdf5",
}
LATENTS = ("mean", "logvar", "latents")
QUIET = {"progress": False, "deterministic": True}


@dataclass
class Golden:
    """A copy of a store and of its source; ``expected`` is what its expected.json has."""

    name: str
    store: Path
    source: Path
    expected: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)

    def rows(self, **how: Any) -> dict[tuple[str, int], dict[str, Any]]:
        """Return the rows of LatentDataset by key and variant."""
        return {(row["key"], int(row["variant"])): row for row in fastvae.LatentDataset(self.store, **how)}

    def shards(self) -> list[Path]:
        """Return the shards, in order."""
        return sorted((self.store / "shards").glob("*.safetensors"))

    def files(self, folder: str = "") -> dict[str, tuple[bytes, int]]:
        """Return the bytes and the time of change of each file in ``folder``, without the locks of a run."""
        found = {path.relative_to(self.store): path for path in (self.store / folder).rglob("*") if path.is_file()}
        return {
            name.as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
            for name, path in found.items()
            if name.parts[0] not in (".lock", "leases")
        }

    def image(self, key: str) -> Image.Image:
        """Return the upright image of ``key``, opened by Pillow alone."""
        if self.name == "tar":
            with tarfile.open(self.source) as tar:
                content = io.BytesIO(tar.extractfile(f"{key}.png").read())
        elif self.name == "manifest":
            (path,) = [line["path"] for line in lines_of(self.source) if str(line["key"]) == key]
            content = self.source.parent / path
        else:
            content = self.source / key
        with Image.open(content) as image:
            return ImageOps.exif_transpose(image)


def lines_of(path):
    """Return the values of a JSONL file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def described(value):
    """Return a value of a row as expected.json has it; see make_stores.described."""
    if not isinstance(value, torch.Tensor):
        return value
    array = value.numpy()
    if array.ndim < 2:
        return array.tolist()
    shape = "x".join(map(str, array.shape))
    return f"{array.dtype} {shape} {hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()}"


def bits(array):
    array = np.ascontiguousarray(array)
    return array.dtype.str, array.shape, array.tobytes()
