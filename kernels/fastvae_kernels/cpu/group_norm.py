"""GroupNorm with SiLU on a CPU: one pass for the statistics in fp64, one that reads x and writes y (group_norm.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastvae_kernels.cpu.library import DTYPES, INT, POINTER, address, library

LANES = 8


class Norm(ctypes.Structure):
    """``struct norm`` of group_norm.c."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "y")),
        *((name, INT) for name in ("dtype", "batch", "pixels", "channels", "groups")),
        *((name, POINTER) for name in ("weight", "bias")),
        ("eps", ctypes.c_double),
        *((name, POINTER) for name in ("sums", "centre", "scale", "shift")),
    )


def takes(x: Tensor) -> bool:
    """Return True if the C kernel takes x [N, C, H, W] in channels_last."""
    return library().why_not is None and x.dtype in DTYPES and x.shape[1] % LANES == 0 and x.numel() > 0


def group_norm_silu(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
    """Write silu(GroupNorm(x)) into y, which may be x, and return y.

    x, y: [N, C, H, W] in channels_last, in one dtype that ``takes`` takes. weight, bias: [C] in any floating dtype.
    """
    functions = library().functions
    batch, channels, height, width = x.shape
    chunks = functions.fastvae_norm_chunks(INT(height * width), INT(channels))
    sums = torch.empty(batch * chunks * 2 * channels, dtype=torch.float64, device=x.device)
    affine = torch.empty(3, batch, channels, dtype=torch.float32, device=x.device)
    weight, bias = (vector.float().contiguous() for vector in (weight, bias))
    given = Norm(
        address(x), address(y), DTYPES[x.dtype], batch, height * width, channels, groups, address(weight),
        address(bias), eps, address(sums), *(address(vector) for vector in affine),
    )  # fmt: skip
    functions.fastvae_norm(ctypes.byref(given), INT(torch.get_num_threads()))
    return y
