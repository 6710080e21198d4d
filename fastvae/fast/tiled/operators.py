"""Convolutions and norms of bands on a CPU: the operators of CpuPass, with the rows above and below given.

A band [rows, W, C] is a piece of an image in channels_last. Every result has the bits of the whole image: Winograd's
tiles begin at the same rows, and oneDNN's sums do not depend on the height where that was measured (docs/memory.md).
So that no machine's bits depend on the budget, oneDNN is always called with blocks of rows whose number depends on the
width alone, and torch's own convolution with one row.
"""

from __future__ import annotations

import math
import mmap
from typing import Any

import torch
import torch.nn.functional as F
from fastvae_kernels.cpu import winograd
from fastvae_kernels.shared.winograd_matrices import FORMS
from torch import Tensor

from fastvae.fast.cpu.cpu_pass import ONEDNN, form_on_cpu
from fastvae.fast.cpu.group_norm import band_norm
from fastvae.fast.forms.form import Form, Forms
from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import PackedWeights, is_small, takes_onednn
from fastvae.fast.tiled.steps import Size

# Products by which the planner weighs forms against the direct one, and a value that a norm reads and writes.
PRODUCTS = {Form.DIRECT: 1.0, Form.WINOGRAD2: 0.5, Form.WINOGRAD4: 0.35}
# Pixels of a chunk of a norm's sums, times channels (kernels/fastvae_kernels/cpu/group_norm.c).
CHUNK = 32768
# Channels of a block of oneDNN's weights, at most.
BLOCK = 64


class BandConvolution:
    """A convolution in its place in the network, run on bands; its packed weight is kept until it is dropped.

    kind: "conv" for 3x3 and 1x1, "downsample" or "upsample". given: size of the whole input.
    """

    def __init__(self, conv: Layer, kind: str, given: Size, operators: CpuOperators):
        self.conv, self.kind, self.packed, self.operators = conv, kind, operators.packed, operators
        self.given = given
        self.factor = 2 if kind == "upsample" else 1
        self.is_3x3 = conv.kernel_size == (3, 3)
        padding = kind == "downsample"  # it is part of the input that oneDNN sees
        self.shape = torch.Size((1, given.channels, given.height + padding, given.width + padding))
        self.form = Form.DIRECT
        if kind != "downsample":
            self.form = form_on_cpu(operators.forms, conv, given.pixels * self.factor**2, kind)
        self.by_rows = not takes_onednn(conv.weight) or is_small(conv, self.shape)
        self.kept: Any = None

    @property
    def tile(self) -> int:
        """Number of input rows of a block: every call but the last takes a multiple, and begins at one."""
        return rows_of_a_block(self.given.width)

    def cost(self, made: Size) -> float:
        """Return the weighed products of the whole image."""
        taps = 16 / 4 if self.kind == "upsample" and self.form is Form.DIRECT else math.prod(self.conv.kernel_size)
        return PRODUCTS[self.form] * taps * made.values * self.conv.in_channels

    def transient_bytes(self, rows: int, width: int) -> int:
        """Return the bytes that one call takes beside its input and its output."""
        item, channels = self.conv.weight.itemsize, self.conv.in_channels
        if self.form is not Form.DIRECT:
            made = torch.Size((1, self.conv.out_channels, rows * self.factor, width * self.factor))
            return 4 * winograd.workspace_size(channels, made, self.form)
        result = rows * width * self.factor * self.factor * self.conv.out_channels
        columns = math.prod(self.conv.kernel_size) * channels * width * self.factor if self.by_rows else 0
        return item * (result + columns)

    @property
    def packed_bytes(self) -> int:
        """Bytes of the weight in another layout that a run keeps, of weights that are not frozen."""
        return 0 if self.packed.frozen else self._copy_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of the same that the model keeps, of frozen weights. oneDNN fills channels up to its blocks."""
        if not self.packed.frozen:
            return 0
        if self.form is not Form.DIRECT or self.kind == "upsample" or self.by_rows:
            return self._copy_bytes
        sizes = (-(-channels // BLOCK) * BLOCK for channels in (self.conv.in_channels, self.conv.out_channels))
        return self.conv.weight.itemsize * math.prod(self.conv.kernel_size) * math.prod(sizes)

    @property
    def _copy_bytes(self) -> int:
        size = self.conv.in_channels * self.conv.out_channels
        if self.form is not Form.DIRECT:
            return 4 * size * FORMS[self.form].window ** 2
        return self.conv.weight.itemsize * size * 16 if self.kind == "upsample" else 0

    def weight(self) -> Tensor:
        """Return the weight in the layout of the form, packed at the first call."""
        if self.kept is None:
            if self.form is not Form.DIRECT:
                self.kept = self.packed.winograd_on_cpu(self.conv, self.form, fresh)
            elif self.kind == "upsample":
                self.kept = self.packed.upsample(self.conv)
            else:
                self.kept = self.conv.weight if self.by_rows else self.packed.onednn_weight(self.conv, self.shape)
        return self.kept

    def __call__(self, window: Tensor, y: Tensor, residual: Tensor | None = None) -> None:
        """Write into y [n, W, O] the result of a window [n + 2, W, C] of rows, zeros outside the image.

        Of a downsample, a window [2n + 1, W + 1, C]; of a 1x1, [n, W, C]. residual: added, may be y.
        """
        if self.form is not Form.DIRECT:
            given = None if residual is None else _nchw(residual)
            x, into = _nchw(window), _nchw(y)
            workspace = self.operators.workspace(winograd.workspace_size(x.shape[1], into.shape, self.form))
            winograd.convolve(x, self.weight(), self.conv.bias, self.form, into, given, halo=True, workspace=workspace)
            return
        block = self.factor if self.by_rows else self.tile * self.factor // self.conv.stride[0]
        step, below = block // self.factor * self.conv.stride[0], self.conv.kernel_size[0] - self.conv.stride[0]
        for place, part in enumerate(y.split(block)):
            first = place * step
            rows = window[first : first + len(part) // self.factor * self.conv.stride[0] + below]
            self._direct(rows, part, None if residual is None else residual[place * block : place * block + len(part)])

    def _direct(self, window: Tensor, y: Tensor, residual: Tensor | None) -> None:
        """Write the result of one call of oneDNN, or of torch."""
        if residual is None:
            y.copy_(self._result(window))
        elif self.by_rows:
            torch.add(self._result(window), residual, out=y)
        else:
            if residual is not y:
                y.copy_(residual)
            ONEDNN._convolution_pointwise_.binary(
                _nchw(y), _nchw(window), self.weight(), self._bias(), *self._geometry(), "add", None, None, [], None
            )

    def _result(self, window: Tensor) -> Tensor:
        if self.kind == "upsample":
            result = F.conv_transpose2d(_nchw(window), self.weight(), self.conv.bias, 2, (3, 1))
        elif self.by_rows:
            result = F.conv2d(_nchw(window), self.weight(), self.conv.bias, self.conv.stride, self._geometry()[0])
        else:
            given = _nchw(window), self.weight(), self._bias(), *self._geometry()
            result = ONEDNN._convolution_pointwise(*given, "none", [], None)
        return result[0].permute(1, 2, 0)

    def _bias(self) -> Tensor | None:
        return None if self.conv.bias is None else self.conv.bias.contiguous()

    def _geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Return padding, stride, dilation and groups: rows are given with their neighbours, columns are padded."""
        across = 1 if self.is_3x3 and self.kind != "downsample" else 0
        return [0, across], list(self.conv.stride), [1, 1], 1


class CpuOperators:
    """The operators of one run, with the weights that it has packed and its norms."""

    def __init__(self, packed: PackedWeights, forms: Forms, dtype: torch.dtype):
        self.packed, self.forms, self.dtype = packed, forms, dtype
        self.convolutions: dict[Layer, BandConvolution] = {}
        self.norms: dict[Layer, Any] = {}
        self.scratch = torch.empty(0)

    def convolution(self, conv: Layer, kind: str, given: Size) -> BandConvolution:
        """Return the convolution of bands of an input of this size, the same until ``drop_weights``."""
        if conv not in self.convolutions:
            self.convolutions[conv] = BandConvolution(conv, kind, given, self)
        return self.convolutions[conv]

    def begin_norm(self, norm: Layer, size: Size) -> Any:
        """Return the norm of an activation of this size, without statistics yet: ``add``, ``close``, ``apply``."""
        self.norms[norm] = band_norm(norm, self.dtype, size.height, size.width)
        return self.norms[norm]

    def workspace(self, size: int) -> Tensor:
        """Return at least so many fp32 values, which the next call gives again."""
        if self.scratch.numel() < size:
            self.scratch = torch.empty(0)  # its memory first
            self.scratch = fresh(size)
        return self.scratch

    def kept_bytes(self) -> int:
        """Return the bytes of the copies of frozen weights, of every convolution that was asked for."""
        return sum(convolution.kept_bytes for convolution in self.convolutions.values())

    def drop_weights(self) -> None:
        """Free the packed weights."""
        for convolution in self.convolutions.values():
            convolution.kept = None


def rows_of_a_block(width: int) -> int:
    """Return the rows of a block: about 1024 pixels, from 4 rows, which Winograd's tiles have, to 32."""
    return 1 << min(max(1024 // width, 4), 32).bit_length() - 1


def statistics_bytes(size: Size) -> int:
    """Return the bytes of a norm's sums."""
    return 16 * size.channels * math.ceil(size.pixels / max(1, CHUNK // size.channels))


def fresh(values: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return unwritten memory for so many values, which the system has back at once when the tensor is dropped.

    glibc keeps freed blocks of up to 32 MB for itself: at 768x1024 with 32 channels 40 MB of 110.
    """
    if values == 0:
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(mmap.mmap(-1, values * dtype.itemsize), dtype=dtype)


def _nchw(rows: Tensor) -> Tensor:
    """Return rows [n, W, C] as [1, C, n, W] in channels_last, with the strides that torch gives it."""
    return rows[None].permute(0, 3, 1, 2)
