"""A plain torch DataLoader of eight workers, whose batches an encoder takes and whose latents are saved one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

WORKERS = 8


class Photographs(torch.utils.data.Dataset):
    """Files as fp32 [3, side, side] in [-1, 1], by ``load``, and their names."""

    def __init__(self, folder: Path, load: Callable[[Path], torch.Tensor]):
        self.paths, self.load = sorted(folder.iterdir()), load

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
        return self.load(self.paths[index]), self.paths[index].stem


class ByPillow:
    """Opens, scales and crops a photograph by Pillow."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, path: Path) -> torch.Tensor:
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        picture = ImageOps.fit(picture, (self.side, self.side), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1


class ByTorchvision:
    """Opens, scales and crops a photograph by torchvision, whose pixels differ from Pillow's."""

    def __init__(self, side: int):
        self.side = side

    def __call__(self, path: Path) -> torch.Tensor:
        from torchvision.io import ImageReadMode, decode_image  # type: ignore[import-not-found]
        from torchvision.transforms import v2  # type: ignore[import-not-found]

        pixels = v2.functional.resize(decode_image(str(path), ImageReadMode.RGB), [self.side], antialias=True)
        return v2.functional.center_crop(pixels, [self.side]).float() / 127.5 - 1


def save_latents(folder: Path, out: Path, load: Callable[[Path], torch.Tensor], encode: Any, batch: int) -> None:
    """Encode each photograph, and save its moments as ``out``/NAME.pt; ``encode``: images to moments on the CPU."""
    out.mkdir()
    loader = torch.utils.data.DataLoader(Photographs(folder, load), batch, num_workers=WORKERS)
    for images, names in loader:
        for name, moments in zip(names, encode(images), strict=True):
            torch.save(moments.half().clone(), out / f"{name}.pt")
