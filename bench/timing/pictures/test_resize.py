"""Times of resize_lanczos on decoded pictures, after a check of every byte, beside torch's bicubic resize.

python -m pytest bench/timing/pictures/test_resize.py --results FILE [--dry]

torch has no Lanczos filter: its bicubic one, with antialias, reads as many pixels as two thirds of Lanczos's and gives
other bytes. Both begin with pictures on the device; the copy there is no part of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from fastvae_kernels import resize

from bench.timing.stopwatch import median


@dataclass(frozen=True)
class Pictures:
    """Pictures of one size, scaled to cover a square and cropped at its centre."""

    count: int
    height: int
    width: int
    side: int
    dtype: str = "uint8"

    @property
    def name(self) -> str:
        return f"resize {self.count}x{self.height}x{self.width} to {self.side}x{self.side}"

    @property
    def scaled(self) -> tuple[int, int]:
        least = min(self.height, self.width)
        return round(self.side * self.height / least), round(self.side * self.width / least)

    @property
    def corner(self) -> tuple[int, int]:
        return (self.scaled[0] - self.side) // 2, (self.scaled[1] - self.side) // 2


TABLE = {
    "cuda": [
        Pictures(8, 1080, 1920, 512), Pictures(1, 1080, 1920, 512), Pictures(8, 1080, 1920, 1024),
        Pictures(8, 800, 800, 512), Pictures(8, 3000, 4000, 512), Pictures(8, 4000, 6000, 1024),
        Pictures(8, 2400, 1080, 512),
    ],
    "cpu": [],
    "dry": [Pictures(2, 20, 30, 9)],
}  # fmt: skip


def bicubic(pictures: torch.Tensor, case: Pictures) -> torch.Tensor:
    """Return the crops by torch's bicubic filter, uint8 [N, 3, side, side]."""
    planes = pictures.permute(0, 3, 1, 2).float()
    scaled = F.interpolate(planes, size=case.scaled, mode="bicubic", antialias=True)
    top, left = case.corner
    return scaled[..., top : top + case.side, left : left + case.side].round().clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def test_resize(case, device, roof, stopwatch, results):
    shape = (case.count, case.height, case.width, 3)
    pictures = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    each = 3 * case.height * case.width
    crops = [
        resize.Crop(index * each, (case.height, case.width), case.scaled, case.corner) for index in range(case.count)
    ]
    tables = resize.plan(crops, (case.side, case.side)).to(device)
    buffer = pictures.view(-1)
    assert torch.equal(resize.launch(buffer, *tables), resize.reference(buffer, *tables))
    calls = {"kernels": lambda: resize.launch(buffer, *tables), "bicubic": lambda: bicubic(pictures, case)}
    seconds = stopwatch.interleaved({name: [call] for name, call in calls.items()})
    medians = {name: median(taken) for name, taken in seconds.items()}
    moved = resize.cost(buffer, *tables).bytes
    results["resize"][case.name] = {
        "count": case.count, "height": case.height, "width": case.width, "side": case.side, "bytes": moved,
        "median_seconds": medians, "share_of_copy_rate": moved / medians["kernels"] / roof["bytes"],
        "host_seconds": dict(stopwatch.host_seconds), "seconds": seconds,
    }  # fmt: skip
