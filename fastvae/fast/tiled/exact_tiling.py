"""Exact tiling of an accelerated model: the setting, and calls of encoder and decoder under it."""

from __future__ import annotations

import torch
from torch import Tensor

from fastvae.fast.forms.form import Forms
from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import PackedWeights
from fastvae.fast.tiled.budget import MaxMemory, bytes_of, check_max_memory
from fastvae.fast.tiled.operators import CpuOperators
from fastvae.fast.tiled.planner import Plan, plan
from fastvae.fast.tiled.run import Run
from fastvae.fast.tiled.steps import Step, steps_of
from fastvae.system.terminal import format_bytes


class ExactTiling:
    """The setting of ``enable_tiling(exact=True)``. Raises ValueError for another ``max_memory``."""

    def __init__(self, max_memory: MaxMemory = "auto"):
        self.max_memory = check_max_memory(max_memory)

    def run(self, part: Layer, name: str, x: Tensor, packed: PackedWeights, forms: Forms) -> Tensor:
        """Return the output of an encoder or decoder for x [N, C, H, W], image by image.

        Raises ValueError for a device other than a CPU, for a block that runs as a module, and if ``max_memory`` is
        less than the least that a plan takes.
        """
        if x.device.type != "cpu":
            raise ValueError(f"exact tiling runs on a CPU, got a model on {x.device}: call disable_tiling")
        operators = CpuOperators(packed, forms, x.dtype)
        steps = steps_of(part, name, x)
        chosen = self._plan(name, x, steps, operators)
        y = x.new_empty(len(x), steps[-1].made.channels, *steps[-1].made[:2])
        if not x.is_contiguous():
            y = y.contiguous(memory_format=torch.channels_last)
        run = Run(steps, chosen, operators, x.dtype)
        for image, result in zip(x, y, strict=True):
            run.image(image.permute(1, 2, 0), result.permute(1, 2, 0))
        return y

    def _plan(self, name: str, x: Tensor, steps: list[Step], operators: CpuOperators) -> Plan:
        held, result = results_bytes(steps, len(x), x.itemsize)
        budget = bytes_of(self.max_memory, x.device)
        chosen = plan(steps, operators, budget - held, result)
        if chosen.bytes + held > budget:
            least = format_bytes(chosen.bytes + held)
            got = "free" if self.max_memory == "auto" else "got"
            raise ValueError(
                f"max_memory must be at least {least} ({chosen.bytes + held} bytes) for the {name} and an input of "
                f"{list(x.shape)}, {got} {format_bytes(budget)}"
            )
        return chosen


def results_bytes(steps: list[Step], batch: int, itemsize: int) -> tuple[int, int]:
    """Return the bytes of the results of a batch beside one image, and those of the image."""
    result = steps[-1].made.values * itemsize
    return (batch - 1) * result, result
