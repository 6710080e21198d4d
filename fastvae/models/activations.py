"""The activation functions a VAE config may name (diffusers.models.activations)."""

from __future__ import annotations

from torch import nn

from fastvae.checkpoints import ACTIVATIONS


def get_activation(act_fn: str) -> nn.Module:
    """The activation module that a config's ``act_fn`` names, in any case.

    Raises ValueError for a name that is none of fastvae.checkpoints.ACTIVATIONS.
    Source: diffusers.models.activations.get_activation.
    """
    name = ACTIVATIONS.get(act_fn.lower())
    if name is None:
        raise ValueError(f"act_fn must be one of {', '.join(ACTIVATIONS)}, got {act_fn!r}")
    return getattr(nn, name)()
