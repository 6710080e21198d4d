"""Counts kept on the device: no Python runs in a compiled call or a graph replay, and adding never waits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.fast.layer_checks import assume_constant_result


class DeviceCounters:
    """Rows of compiled calls and rows that are not finite, summed in one small tensor per device."""

    def __init__(self):
        self.by_device: dict[torch.device, Tensor] = {}

    def add(self, y: Tensor, rows: int = 0) -> None:
        """Add ``rows``, and the rows of y that are not finite if y is fp16."""
        if rows:
            _counts_on(self, y.device)[0].add_(rows)
        if y.dtype == torch.float16:  # bf16 and fp32 do not overflow at these magnitudes
            _counts_on(self, y.device)[1].add_((~y.isfinite().flatten(1).all(1)).sum())

    def rows(self) -> int:
        """Return the rows counted so far; waits for the devices."""
        return sum(int(counts[0]) for counts in self.by_device.values())

    def non_finite_rows(self) -> int:
        """Return the rows that were not finite; waits for the devices."""
        return sum(int(counts[1]) for counts in self.by_device.values())


# Under torch.compile the tensor is a constant of the graph: a dictionary look-up would be guarded and recompiled.
@assume_constant_result
def _counts_on(counters: DeviceCounters, device: torch.device) -> Tensor:
    if device not in counters.by_device:
        with torch.inference_mode(False):  # an inference tensor cannot be written outside inference mode
            counters.by_device[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return counters.by_device[device]
