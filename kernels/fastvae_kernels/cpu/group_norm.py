"""GroupNorm with SiLU on a CPU: one pass for the statistics in fp64, one that reads x and writes y (group_norm.c)."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from fastvae_kernels.cpu.library import DTYPES, INT, POINTER, address, check_images, library

LANES = 8


class Norm(ctypes.Structure):
    """``struct norm`` of group_norm.c."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "y")),
        *((name, INT) for name in ("dtype", "batch", "pixels", "channels", "groups", "plain")),
        *((name, POINTER) for name in ("weight", "bias")),
        ("eps", ctypes.c_double),
        *((name, POINTER) for name in ("sums", "centre", "scale", "shift")),
    )


def takes(x: Tensor) -> bool:
    """Return True if the C kernel takes x [N, C, H, W] in channels_last."""
    return library().why_not is None and x.dtype in DTYPES and x.shape[1] % LANES == 0 and x.numel() > 0


def group_norm_silu(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Write silu(GroupNorm(x)) into y, which may be x, and return y.

    x, y: [N, C, H, W] in channels_last and in one dtype that ``takes`` takes, or ValueError is raised. weight, bias:
    [C] in any floating dtype.
    """
    check_images(x=x, y=y)
    batch, channels, height, width = x.shape
    chunks = _chunks(height * width, channels)
    sums = torch.empty(batch * chunks * 2 * channels, dtype=torch.float64, device=x.device)
    affine = torch.empty(3, batch, channels, dtype=torch.float32, device=x.device)
    weight, bias = (vector.float().contiguous() for vector in (weight, bias))
    given = Norm(
        address(x), address(y), DTYPES[x.dtype], batch, height * width, channels, groups, 0,
        address(weight), address(bias), eps, address(sums), *(address(vector) for vector in affine),
    )  # fmt: skip
    library().function("norm", channels)(ctypes.byref(given), INT(torch.get_num_threads()))
    return y


def _chunks(pixels: int, channels: int) -> int:
    """Return the number of sums of each channel of an image."""
    count = library().function("norm_chunks", channels)
    count.restype = INT
    return count(INT(pixels), INT(channels))


class BandNorm:
    """GroupNorm of one image whose rows come in bands: ``add`` all of them, ``close``, then ``apply`` to any pixels.

    Statistics and results have the bits of ``group_norm_silu`` of the whole image, whatever the bands.
    """

    def __init__(self, dtype: torch.dtype, pixels: int, weight: Tensor, bias: Tensor, groups: int, eps: float):
        channels = weight.shape[0]
        chunks = _chunks(pixels, channels)
        self.sums: Tensor | None = torch.zeros(chunks, 2, channels, dtype=torch.float64, device=weight.device)
        self.affine = torch.empty(3, channels, dtype=torch.float32, device=weight.device)
        self.weight, self.bias = (vector.float().contiguous() for vector in (weight, bias))
        self.added = 0
        self.given = Norm(
            None, None, DTYPES[dtype], 1, pixels, channels, groups, 0, address(self.weight), address(self.bias), eps,
            address(self.sums), *(address(vector) for vector in self.affine),
        )  # fmt: skip

    def _function(self, name: str) -> Any:
        return library().function(f"norm_{name}", self.given.channels)

    def add(self, x: Tensor) -> None:
        """Add the next pixels [pixels, C]."""
        self.given.x = address(x)
        threads = INT(torch.get_num_threads())
        self._function("add")(ctypes.byref(self.given), INT(self.added), INT(x.shape[0]), threads)
        self.added += x.shape[0]

    def close(self) -> None:
        """Compute scale and shift of each channel; the sums are dropped."""
        self._function("affine")(ctypes.byref(self.given))
        self.sums = None

    def apply(self, x: Tensor, y: Tensor, silu: bool = True) -> None:
        """Write silu(norm(x)), or norm(x), into y, which may be x: [pixels, C] both."""
        self.given.x, self.given.y, self.given.plain = address(x), address(y), int(not silu)
        threads = INT(torch.get_num_threads())
        self._function("apply")(ctypes.byref(self.given), INT(x.shape[0]), threads)
