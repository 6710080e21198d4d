"""The derived tolerance: an error may be at most twice what plain torch makes in the same dtype, and one rounding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_as_accurate(ours: Tensor, eager: Tensor, truth: Tensor) -> None:
    """Hold ``ours`` to the truth in float64 as closely as torch's own result ``eager`` in the same dtype.

    max|ours - truth| <= 2 max|eager - truth| + eps max|truth|, and rms(ours - truth) <= 1.5 rms(eager - truth) + eps
    rms(truth), with eps of the dtype. All three must stem from the same rounded weights and inputs.
    """
    assert_as_accurate_as_one_of(ours, [eager], truth)


def assert_as_accurate_as_one_of(ours: Tensor, eager: Sequence[Tensor], truth: Tensor) -> None:
    """Hold ``ours`` to the larger of the errors of torch's own results: those of both layouts, as reports do."""
    assert truth.dtype == torch.float64
    assert all(ours.shape == plain.shape == truth.shape for plain in eager)
    assert all(ours.dtype == plain.dtype for plain in eager)
    assert torch.isfinite(ours).all(), "not finite"
    if truth.numel() == 0:
        return
    eps = torch.finfo(ours.dtype).eps
    errors = [plain.double() - truth for plain in eager]
    error, allowed = (ours.double() - truth).abs().max(), max(plain.abs().max() for plain in errors)
    limit = 2 * allowed + eps * truth.abs().max()
    assert error <= limit, f"largest error {error:.3e}, allowed {limit:.3e} (eager's own {allowed:.3e})"
    spread, allowed = _rms(ours.double() - truth), max(map(_rms, errors))
    limit = 1.5 * allowed + eps * _rms(truth)
    assert spread <= limit, f"rms error {spread:.3e}, allowed {limit:.3e} (eager's own {allowed:.3e})"


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
