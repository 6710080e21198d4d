"""The gate before every time: a result may be twice as far from float64 as plain torch's in the same dtype."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvae.report.rivals import decoding, encoding


@dataclass(frozen=True)
class Truth:
    """What is right for some rows of a batch, in float64, and how far from it a result may be: at most, and in rms."""

    rows: list[int]
    values: Tensor
    allowed: float
    allowed_rms: float

    def judge(self, y: Tensor) -> tuple[float | None, float, str | None]:
        """The largest error of ``y`` [B, ...], the one allowed, and in a sentence what is wrong with it, or None."""
        got = y[self.rows].double().to(self.values.device)
        if got.shape != self.values.shape:
            return None, self.allowed, f"wrong: its shape is {tuple(got.shape[1:])}, not {tuple(self.values.shape[1:])}"
        if not torch.isfinite(y).all():
            return None, self.allowed, f"wrong: its result in {y.dtype} is not finite, so no time is given"
        error = (got - self.values).abs().max().item()
        # So asked that a tolerance of NaN, from weights that are infinite, admits nobody.
        if not (error <= self.allowed and _rms(got - self.values) <= self.allowed_rms):
            return error, self.allowed, f"wrong: its largest error is {error:.2g}, so no time is given"
        return error, self.allowed, None


def truth_of(plain: Any, task: str, x: Tensor) -> Truth:
    """``task`` on the first and the last row of x by the weights and inputs of ``plain``, rounded as they are.

    The errors allowed are derived from plain torch's own in the same dtype: 2 max|eager - f64| + eps max|f64|, and
    1.5 rms(eager - f64) + eps rms(f64), where eager lies in memory as NCHW or in channels_last, whichever errs more.
    Where eager itself is not finite, bfloat16 stands in, which has the range.
    """
    make = encoding if task == "encode" else decoding
    rows = sorted({0, x.shape[0] - 1})
    # Image by image, as float64 takes four times the memory of half precision; and not every accelerator has it.
    place = x.device if x.device.type == "cuda" else torch.device("cpu")
    run = make(copy.deepcopy(plain).to(device=place, dtype=torch.float64))
    values = torch.cat([run(x[row : row + 1].to(device=place, dtype=torch.float64)) for row in rows])
    errors, eps = _errors(make(plain), x, rows, values), torch.finfo(x.dtype).eps
    if not all(torch.isfinite(error).all() for error in errors):
        wide = make(copy.deepcopy(plain).to(torch.bfloat16))
        errors, eps = _errors(wide, x.to(torch.bfloat16), rows, values), torch.finfo(torch.bfloat16).eps
    largest, rms = max(error.abs().max().item() for error in errors), max(map(_rms, errors))
    return Truth(rows, values, *tolerance(largest, rms, values.abs().max().item(), _rms(values), eps))


def _errors(eager: Any, x: Tensor, rows: list[int], values: Tensor) -> list[Tensor]:
    # On a CPU torch's own GroupNorm errs up to a hundred times as much in channels_last as in NCHW, in fp32.
    both = x.contiguous(), x.contiguous(memory_format=torch.channels_last)
    return [eager(laid_out)[rows].double().to(values.device) - values for laid_out in both]


def tolerance(error: float, error_rms: float, largest: float, rms: float, eps: float) -> tuple[float, float]:
    """(largest error, rms of the errors) that are allowed, by eager's own and the size of what is right."""
    return 2 * error + eps * largest, 1.5 * error_rms + eps * rms


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()
