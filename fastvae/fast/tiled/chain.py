"""The layers between two stored activations, as stages over one source of bands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastvae.fast.layer_checks import Layer
from fastvae.fast.tiled.bands import Convolved, Downsampled, Residual, Stage, Tap
from fastvae.fast.tiled.operators import CpuOperators
from fastvae.fast.tiled.steps import Kind, Step


@dataclass
class Chain:
    """Steps over a source, added one by one; ``stage`` gives the bands behind the last.

    Each norm inside needs the statistics of its whole input first: ``barriers`` has these norms, with the stage that
    gives their input. A norm of the source itself is no barrier if ``norm_known``.
    """

    operators: CpuOperators
    stage: Stage
    norm_known: bool
    barriers: list[tuple[Layer, Stage]] = field(default_factory=list)

    def add(self, step: Step) -> None:
        """Add a step."""
        layer, stage = step.layer, self.stage
        self._barrier(step.norm)
        if step.kind is Kind.FIRST:
            self.stage = Convolved(stage, self._convolution(layer.conv_in, "conv", stage))
        elif step.kind is Kind.LAST:
            self.stage = Convolved(stage, self._convolution(layer.conv_out, "conv", stage), self._norm(step.norm))
        elif step.kind is Kind.DOWNSAMPLE:
            self.stage = Downsampled(stage, self._convolution(layer.conv, "downsample", stage))
        elif step.kind is Kind.UPSAMPLE:
            self.stage = Convolved(stage, self._convolution(layer.conv, "upsample", stage))
        else:
            self.barriers.append((layer.norm2, self._inner(layer, stage)))
            first = self._convolution(layer.conv1, "conv", stage)
            second = self._convolution(layer.conv2, "conv", self.barriers[-1][1])
            waiting = first.tile + second.tile + stage.most
            residual = Residual(stage.size, waiting, self._shortcut(layer, stage))
            self.stage = self._outer(layer, self._inner(layer, Tap(stage, residual)), residual)
        self.norm_known = False

    def add_inner(self, block: Step) -> Stage:
        """Return the stage of a residual block's inner activation, behind its first convolution, to be stored."""
        self._barrier(block.norm)
        return self._inner(block.layer, self.stage)

    def add_outer(self, block: Step, inner: Stage) -> Stage:
        """Return the stage of a residual block whose inner activation is stored: of its bands, and the input's."""
        convolution = self._convolution(block.layer.conv2, "conv", inner)
        rows = -(-inner.most // convolution.tile) * convolution.tile
        shortcut = self._shortcut(block.layer, self.stage)
        residual = Residual(self.stage.size, rows + self.stage.most, shortcut, feed=self.stage)
        return self._outer(block.layer, inner, residual)

    def _inner(self, block: Layer, stage: Stage) -> Stage:
        return Convolved(stage, self._convolution(block.conv1, "conv", stage), self._norm(block.norm1))

    def _outer(self, block: Layer, inner: Stage, residual: Residual) -> Stage:
        return Convolved(inner, self._convolution(block.conv2, "conv", inner), self._norm(block.norm2), residual)

    def _barrier(self, norm: Layer | None) -> None:
        if norm is not None and not self.norm_known:
            self.barriers.append((norm, self.stage))
            self.norm_known = True

    def _norm(self, norm: Layer | None) -> Callable[[], Any]:
        norms = self.operators.norms  # a reference to the chain would be a circle, which keeps memory
        return lambda: norms[norm]

    def _shortcut(self, block: Layer, stage: Stage) -> Any:
        return None if block.conv_shortcut is None else self._convolution(block.conv_shortcut, "conv", stage)

    def _convolution(self, conv: Layer, kind: str, stage: Stage) -> Any:
        return self.operators.convolution(conv, kind, stage.size)
