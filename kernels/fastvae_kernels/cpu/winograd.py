"""3x3 convolutions of stride 1 and padding 1 by Winograd's algorithm on a CPU, with products in fp32 (winograd.c)."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from fastvae_kernels.cpu.library import DTYPES, INT, POINTER, address, check_images, library
from fastvae_kernels.shared.winograd_matrices import FORMS, Matrix

LANES, PANEL = 8, 16
# The C code multiplies this many tiles at once, that of AVX2 half of them.
ROWS = 12
MANY_CHANNELS = 384


class Convolution(ctypes.Structure):
    """``struct convolution`` of winograd.c."""

    _fields_ = (
        *((name, POINTER) for name in ("x", "weight", "bias", "residual", "y")),
        *(
            (name, INT)
            for name in ("dtype", "batch", "height", "width", "inward", "outward", "tile", "upsample", "halo")
        ),
        *((name, POINTER) for name in ("input", "output")),
    )


def takes(weight: Tensor) -> bool:
    """Return True if the C kernel takes a weight [O, C, 3, 3]."""
    outward, inward = weight.shape[:2]
    return library().why_not is None and weight.dtype in DTYPES and not (inward % LANES or outward % PANEL)


def packed_size(weight: Tensor, form: str) -> int:
    """Return the number of floats that ``pack`` writes: 1.8 or 4 times the weight's values."""
    return FORMS[form].window ** 2 * weight.shape[0] * weight.shape[1]


def pack(weight: Tensor, form: str, into: Tensor | None = None) -> Tensor:
    """Return U [window², O / 16, C, 16] of a weight [O, C, 3, 3] in any strides: from fp64, rounded once to fp32.

    into: fp32 memory for at least ``packed_size`` values; by default new memory.
    """
    outward, inward = weight.shape[:2]
    matrices, size = FORMS[form], packed_size(weight, form)
    memory = torch.empty(size, dtype=torch.float32, device=weight.device) if into is None else into[:size]
    packed = memory.view(matrices.window**2, outward // PANEL, inward, PANEL)
    strides = (INT * 4)(*weight.stride())
    matrix = (ctypes.c_double * (3 * matrices.window))(*(value for row in matrices.weight for value in row))
    library().function("winograd_weight", PANEL)(
        INT(DTYPES[weight.dtype]), POINTER(address(weight)), strides, INT(inward), INT(outward), INT(matrices.window),
        matrix, POINTER(address(packed)), INT(torch.get_num_threads()),
    )  # fmt: skip
    return packed


def workspace_size(inward: int, y: torch.Size, form: str) -> int:
    """Return the number of floats that ``convolve`` of so many channels works in, for results [N, O, H, W]."""
    size = library().function("winograd_workspace", inward)
    size.restype = INT
    most = INT(_tiles_at_once(inward, y, form))
    return torch.get_num_threads() * size(INT(FORMS[form].tile), INT(inward), INT(y[1]), most)


def convolve(
    x: Tensor,
    packed: Tensor,
    bias: Tensor | None,
    form: str,
    y: Tensor,
    residual: Tensor | None = None,
    halo: bool = False,
    workspace: Tensor | None = None,
) -> Tensor:
    """Write the convolution of x [N, C, H, W] into y [N, O, H, W], or that of x enlarged to [N, O, 2H, 2W]; return y.

    x, y and residual have one dtype and channels_last, or ValueError is raised. packed: ``pack`` of the weight.
    bias: [O]. residual: added to the result, may be y. workspace: fp32 memory for at least ``workspace_size`` values,
    or ValueError is raised; by default new memory.
    halo: x [1, C, H + 2, W] is a band of an image with the row above and the row below it. Its y has the whole image's
    bits if the band begins at a multiple of the form's tile (in rows of y), and ends at one or at the image's end.
    """
    check_images(x=x, y=y, residual=residual)
    matrices, threads = FORMS[form], torch.get_num_threads()
    inward, (batch, outward, height, width) = x.shape[1], y.shape
    size = workspace_size(inward, y.shape, form)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.float32, device=x.device)
    if workspace.dtype != torch.float32 or workspace.numel() < size:
        raise ValueError(
            f"workspace must be fp32 memory for at least {size} values, got {workspace.numel()} of {workspace.dtype}"
        )
    window_matrix, result_matrix = _as_floats(matrices.input), _as_floats(matrices.output)
    bias = None if bias is None else bias.float().contiguous()
    given = Convolution(
        *(address(values) for values in (x, packed, bias, residual, y)), DTYPES[x.dtype], batch, height, width, inward,
        outward, matrices.tile, int(width > x.shape[3]), int(halo), ctypes.addressof(window_matrix),
        ctypes.addressof(result_matrix),
    )  # fmt: skip
    library().function("winograd", inward)(
        ctypes.byref(given), INT(_tiles_at_once(inward, y.shape, form)), POINTER(address(workspace)), INT(threads)
    )
    return y


def _tiles_at_once(channels: int, y: torch.Size, form: str) -> int:
    """Return the tiles of a chunk, no more than a thread's share of y. No bit depends on it."""
    batch, _, height, width = y
    tiles = batch * -(-height // FORMS[form].tile) * -(-width // FORMS[form].tile)
    share = -(-tiles // (torch.get_num_threads() * ROWS)) * ROWS
    return min(_most_tiles(channels), max(share, ROWS))


def _most_tiles(channels: int) -> int:
    """Return the most tiles of a chunk: few channels, few tiles, so that V and M stay near.

    On two Zen 5 cores: 36 tiles of 128 channels (1.3 MB a core), 72 of 512 (11 MB, but U is read half as often).
    """
    return 3 * ROWS if channels < MANY_CHANNELS else 6 * ROWS


def _as_floats(matrix: Matrix) -> ctypes.Array:
    values = [value for row in matrix for value in row]
    return (ctypes.c_float * len(values))(*values)
