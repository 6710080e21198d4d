"""Weights of Pillow's Lanczos resize along one axis, made on the CPU with Pillow's roundings.

Output i of ``new`` has its centre at low + (i + 0.5) (high - low) / new of the ``old`` values, and weighs those within
3 times the scale (at least 3) of it by sinc(x) sinc(x / 3). Weights are computed in float64, divided by their sum, and
rounded to 22 bits. Source: Pillow, src/libImaging/Resample.c (precompute_coeffs, normalize_coeffs_8bpc).
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 22
# A weight as near as this to a rounding limit, in units of 2^-22, is computed as Pillow does, operation by operation:
# torch's sine and order of summation made differences up to 2^-29 in 28,497 axes of 64 to 6,000 values.
_NEAR = 2.0**-20


class Axis(NamedTuple):
    """First of the values that each output weighs, int32 [new], and their weights times 2^22, int32 [taps, new].

    Each output weighs the same number of values, all inside the axis; where Pillow weighs fewer, weights are 0.
    """

    first: Tensor
    weights: Tensor


@functools.lru_cache(maxsize=256)
def axis(old: int, new: int, low: float, high: float) -> Axis:
    """Return the weights from ``old`` values to ``new``, of the part from ``low`` to ``high`` in values.

    Raises OverflowError if a sum of bytes by these weights could leave int32.
    """
    # Pillow keeps a box in float32.
    low, high = torch.tensor([low, high], dtype=torch.float32, device="cpu").tolist()
    scale = torch.tensor(high - low, dtype=torch.float32, device="cpu").item() / new
    support = 3.0 * max(scale, 1.0)
    centre = low + (torch.arange(new, dtype=torch.float64, device="cpu") + 0.5) * scale
    first = (centre - support + 0.5).trunc().clamp(min=0.0)
    last = (centre + support + 0.5).trunc().clamp(max=old)
    place = first[:, None] + torch.arange(int((last - first).max()), device="cpu")  # [new, taps]
    kernel = _lanczos((place - centre[:, None] + 0.5) * (1.0 / max(scale, 1.0)))
    kernel = torch.where(place < last[:, None], kernel, 0.0)
    scaled = kernel / kernel.sum(1, keepdim=True) * 2.0**BITS
    weights = _round(scaled)
    near = ((scaled.abs().frac() - 0.5).abs() < _NEAR).any(1)
    for index in near.nonzero().flatten().tolist():
        exact = _exact(int(first[index]), int(last[index]), centre[index].item(), 1.0 / max(scale, 1.0))
        weights[index, : len(exact)] = _round(kernel.new_tensor(exact) * 2.0**BITS)
    _check_sums(weights)
    return _equally_long(first.int(), weights, old)


def _check_sums(weights: Tensor) -> None:
    """Raise OverflowError unless every sum of bytes times weights [outputs, taps], in any order, fits in int32.

    The largest is 9/7 of 255 * 2^22, 0.64 of 2^31: enlarged from two values, an output beside the edge weighs them by
    L(1/2) and L(3/2) = -2/9 L(1/2).
    """
    highest = weights.clamp(min=0).sum(1).max().item()
    lowest = weights.clamp(max=0).sum(1).min().item()
    if 255 * highest + (1 << (BITS - 1)) >= 2**31 or 255 * lowest < -(2**31):
        raise OverflowError(f"weights of an output must add up to 2^31 / 255 at most, got {highest} and {lowest}")


def _round(scaled: Tensor) -> Tensor:
    return (scaled + 0.5 * scaled.sign()).int()  # int() cuts


def _lanczos(x: Tensor) -> Tensor:
    """Return sinc(x) sinc(x / 3), with the sine of three times an angle from the angle's: torch.sinc takes 8 times as
    long as both."""
    sine = torch.sin(x * (math.pi / 3))
    kernel = sine.square() * (3.0 - 4.0 * sine.square()) / (x.square() * (math.pi**2 / 3))
    return torch.where((x >= -3.0) & (x < 3.0), torch.where(x == 0.0, 1.0, kernel), 0.0)


def _exact(first: int, last: int, centre: float, inverse: float) -> list[float]:
    """Return the weights of one output by the C library's sine, added from left to right."""

    def sinc(x: float) -> float:
        return 1.0 if x == 0.0 else math.sin(x * math.pi) / (x * math.pi)

    places = [(place - centre + 0.5) * inverse for place in range(first, last)]
    kernel = [sinc(x) * sinc(x / 3) if -3.0 <= x < 3.0 else 0.0 for x in places]
    total = 0.0
    for value in kernel:
        total += value
    return [value / total for value in kernel]


def _equally_long(first: Tensor, weights: Tensor, old: int) -> Axis:
    """Cut zeros off both ends of each output's weights, and move windows that would end outside to the left."""
    taps = weights.shape[1]
    used = weights != 0
    begin = used.int().argmax(1)
    kept = int((taps - used.flip(1).int().argmax(1) - begin).max())
    first = first + begin
    moved = (first + kept - old).clamp(min=0)
    place = (begin - moved)[:, None] + torch.arange(kept, device="cpu")  # [new, kept], of the uncut weights
    inside = (place >= 0) & (place < taps)
    cut = torch.where(inside, weights.gather(1, place.clamp(0, taps - 1)), 0)
    return Axis((first - moved).int(), cut.T.contiguous())
