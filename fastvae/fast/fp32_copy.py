"""A copy of a VAE in fp32, on which rows that overflow half precision are computed again."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from fastvae.fast.survey import Snapshot


class Fp32Copy:
    """A stock fp32 copy of a VAE without the part that is not called, kept until modules or addresses change.

    Values may change in place at any time, so ``updated`` writes them again: at most 0.2 GB for Stable Diffusion's
    encoder, where a new copy takes the modules' Python as well.
    """

    def __init__(self, vae: nn.Module, unused: str, path: Any):
        idle = getattr(vae, unused, None)
        # The memo leaves out the part that is not called, and the fast path, so the copy is stock.
        self.model: Any = copy.deepcopy(vae, {id(path): None, id(idle): None}).float()
        theirs = dict([*vae.named_parameters(), *vae.named_buffers()])
        self.pairs = [
            (ours, theirs[name]) for name, ours in [*self.model.named_parameters(), *self.model.named_buffers()]
        ]
        skipped = set() if idle is None else set(idle.modules())
        self.source, self.snapshot = vae, Snapshot(module for module in vae.modules() if module not in skipped)

    def holds(self, vae: nn.Module) -> bool:
        """Return True if this is a copy of ``vae`` as it is now, but for the values of its weights."""
        return vae is self.source and self.snapshot.holds()

    @torch.no_grad()
    def updated(self) -> Any:
        """Return the copy, with the values that the weights have now."""
        for ours, theirs in self.pairs:
            ours.copy_(theirs)
        return self.model

    def bytes(self) -> int:
        """Return the bytes of the copy."""
        return sum(_bytes(ours) for ours, _ in self.pairs)


def _bytes(values: Tensor) -> int:
    return values.numel() * values.element_size()
