"""Activation functions by name (diffusers.models.activations)."""

from __future__ import annotations

from torch import nn

from fastvae.checkpoints import ACTIVATIONS


def get_activation(act_fn: str) -> nn.Module:
    """Return the activation module that ``act_fn`` names, in upper or lower case.

    Raises ValueError for a name that is not in fastvae.checkpoints.ACTIVATIONS.
    Source: diffusers.models.activations.get_activation.
    """
    name = ACTIVATIONS.get(act_fn.lower())
    if name is None:
        raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {act_fn!r}")
    return getattr(nn, name)()
