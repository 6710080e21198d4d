"""What is counted on the device: no Python runs in a compiled call or in a graph's replay, and adding never waits."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.fast.layer_checks import assume_constant_result


class DeviceCounters:
    """Rows of compiled calls, and rows that were not finite, added up in one small tensor for each device."""

    def __init__(self):
        self.kept: dict[torch.device, Tensor] = {}

    def add(self, y: Tensor, rows: int = 0) -> None:
        """Count ``rows``, and the rows of y that are not finite where it is of the dtype that overflows."""
        if rows:
            _tally_on(self, y.device)[0].add_(rows)
        if y.dtype == torch.float16:  # nothing else overflows at these sizes
            _tally_on(self, y.device)[1].add_((~y.isfinite().flatten(1).all(1)).sum())

    def rows(self) -> int:
        """The rows counted so far; waits for the devices."""
        return sum(int(tally[0]) for tally in self.kept.values())

    def non_finite_rows(self) -> int:
        """Those that were not finite; waits for the devices."""
        return sum(int(tally[1]) for tally in self.kept.values())


# Compiled, the tensor is a constant of the graph: looked up in the dictionary it would be guarded, and recompiled for.
@assume_constant_result
def _tally_on(tally: DeviceCounters, device: torch.device) -> Tensor:
    if device not in tally.kept:
        with torch.inference_mode(False):  # a tensor of inference mode could not be added to outside it
            tally.kept[device] = torch.zeros(2, dtype=torch.int64, device=device)
    return tally.kept[device]
