"""Check before every measurement: at most twice the error of plain torch in the same dtype, against float64."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastvae.fast.cpu.group_norm import in_both_layouts
from fastvae.report.contestants import decoding, encoding

# Values of a strip of an image, times nine in float64: 0.6 GB.
LARGE = 2**23


@dataclass(frozen=True)
class Truth:
    """Right values of some rows of a batch in float64, and the allowed error of a result: largest and rms."""

    rows: list[int]
    values: Tensor
    allowed: float
    allowed_rms: float

    def errors(self, y: Tensor) -> tuple[float, float]:
        """Return the largest and the rms error of ``y`` [B, ...]."""
        error = y[self.rows].double().to(self.values.device) - self.values
        return error.abs().max().item(), _rms(error)

    def judge(self, y: Tensor) -> tuple[float | None, float, str | None]:
        """Return the largest error of ``y`` [B, ...], the allowed one, and a sentence for a wrong result, or None."""
        if y.shape[1:] != self.values.shape[1:]:
            return None, self.allowed, f"wrong: its shape is {tuple(y.shape[1:])}, not {tuple(self.values.shape[1:])}"
        if not torch.isfinite(y).all():
            return None, self.allowed, f"wrong: its result in {y.dtype} is not finite, so no time is given"
        error, error_rms = self.errors(y)
        # Written with `not`, so that a tolerance of NaN (infinite weights) accepts no result.
        if not (error <= self.allowed and error_rms <= self.allowed_rms):
            return error, self.allowed, f"wrong: its largest error is {error:.2g}, so no time is given"
        return error, self.allowed, None


def truth_of(plain: Any, task: str, x: Tensor) -> Truth:
    """Run ``task`` in float64 on the first and the last row of x, with the rounded weights of ``plain``.

    The allowed errors are derived from plain torch in the same dtype: 2 max|eager - f64| + eps max|f64|, and
    1.5 rms(eager - f64) + eps rms(f64), with eager in NCHW or channels_last, whichever has the larger error. If eager
    is not finite, the errors are those of bfloat16, which has a larger range.
    """
    make = encoding if task == "encode" else decoding
    rows = sorted({0, x.shape[0] - 1})
    # Image by image: float64 takes four times the memory of half precision. Not every accelerator has it.
    place = x.device if x.device.type == "cuda" else torch.device("cpu")
    run = make(copy.deepcopy(plain).to(device=place, dtype=torch.float64))
    with ConvolutionInStrips():
        values = torch.cat([run(x[row : row + 1].to(device=place, dtype=torch.float64)) for row in rows])
    errors, eps = _errors(make(plain), x, rows, values), torch.finfo(x.dtype).eps
    if not all(torch.isfinite(error).all() for error in errors):
        wide = make(copy.deepcopy(plain).to(torch.bfloat16))
        errors, eps = _errors(wide, x.to(torch.bfloat16), rows, values), torch.finfo(torch.bfloat16).eps
    largest, rms = max(error.abs().max().item() for error in errors), max(map(_rms, errors))
    return Truth(rows, values, *tolerance(largest, rms, values.abs().max().item(), _rms(values), eps))


class ConvolutionInStrips(TorchFunctionMode):
    """Context in which a 3x3 convolution in float64 on a CPU takes strips of rows, with the same result.

    torch lays out nine copies of the image for it: 9.7 GB for 128 channels of 1024x1024.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_large = func is F.conv2d and args[0].device.type == "cpu" and args[0].numel() > LARGE
        if not is_large or args[1].shape[2:] != (3, 3) or args[0].dtype != torch.float64:
            return func(*args, **(kwargs or {}))
        x, weight, bias, stride, padding, *_ = args
        x, step = F.pad(x, (padding[1], padding[1], padding[0], padding[0])), stride[0]
        rows = (x.shape[2] - 3) // step + 1
        strip = max(1, LARGE * rows // x.numel())
        parts = (x[:, :, step * row : step * (min(row + strip, rows) - 1) + 3] for row in range(0, rows, strip))
        return torch.cat([func(part, weight, bias, stride) for part in parts], dim=2)


def _errors(eager: Any, x: Tensor, rows: list[int], values: Tensor) -> list[Tensor]:
    return [y[rows].double().to(values.device) - values for y in in_both_layouts(eager, x)]


def tolerance(error: float, error_rms: float, largest: float, rms: float, eps: float) -> tuple[float, float]:
    """Return (largest error, rms error) that are allowed, from eager's errors and the size of the right values."""
    return 2 * error + eps * largest, 1.5 * error_rms + eps * rms


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
