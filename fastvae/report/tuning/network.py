"""The whole network against float64: forms may be as far from the truth as the derived tolerance allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvae.report.contestants import TASKS, decoding, encoding, images
from fastvae.report.correctness import Truth, truth_of

# Errors of small and of large images: statistics over many pixels, and edges that are most of the image.
SIZES = (256, 1024)


@dataclass(frozen=True)
class Verdict:
    """Errors of an encode or decode as shares of what is allowed; above 1, or not finite, it is wrong."""

    task: str
    size: int
    largest: float
    rms: float

    @property
    def is_right(self) -> bool:
        return self.largest <= 1 and self.rms <= 1  # False for NaN

    def __str__(self) -> str:
        errors = f"largest error {self.largest:.2f} and rms {self.rms:.2f} of what is allowed"
        return f"{self.task} {self.size}x{self.size}: {errors}"


class Check:
    """Right results of a model for one task and size, made at the first use: float64 takes minutes on a CPU."""

    def __init__(self, plain: Any, task: str, size: int):
        self.plain, self.task, self.size = plain, task, size
        self.truth: Truth | None = None
        self.x: Tensor | None = None

    @torch.no_grad()
    def verdict(self, vae: Any) -> Verdict:
        """Return the errors of ``vae``, the accelerated model."""
        if self.truth is None or self.x is None:
            self.x = input_for(self.plain, self.task, self.size)
            self.truth = truth_of(self.plain, self.task, self.x)
        run = encoding(vae) if self.task == "encode" else decoding(vae)
        largest, rms = self.truth.errors(run(self.x))
        return Verdict(self.task, self.size, largest / self.truth.allowed, rms / self.truth.allowed_rms)


def checks(plain: Any) -> list[Check]:
    """Return the checks of a model, the cheap ones first."""
    return [Check(plain, task, size) for size in SIZES for task in TASKS]


def input_for(plain: Any, task: str, size: int) -> Tensor:
    """Return an image [1, C, size, size], or the mean of its latents [1, L, h, w]."""
    x = images(plain, size, 1)
    return x if task == "encode" else encoding(plain)(x).chunk(2, dim=1)[0].contiguous()
