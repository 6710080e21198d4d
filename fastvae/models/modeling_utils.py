"""What every model here shares: a frozen config, dtype and device, gradient checkpointing (diffusers: ModelMixin)."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastvae.checkpoints.config import FrozenConfig


def register_to_config(init):
    """Keep a constructor's arguments, defaults included, as the frozen ``config`` of the instance.

    Source: diffusers.configuration_utils.register_to_config.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self, *args, **kwargs):
        arguments = signature.bind(self, *args, **kwargs)
        arguments.apply_defaults()
        config = {name: value for name, value in arguments.arguments.items() if name != "self"}
        config = {name: tuple(value) if isinstance(value, list) else value for name, value in config.items()}
        object.__setattr__(self, "_config", FrozenConfig(config))
        init(self, **config)

    return wrapper


class ModelMixin(nn.Module):
    """A module that knows its config, its dtype and device, and how to checkpoint gradients.

    Source: diffusers.models.modeling_utils.ModelMixin.
    """

    _supports_gradient_checkpointing = True
    _config: FrozenConfig

    @property
    def config(self) -> FrozenConfig:
        """The constructor's arguments, read-only, by attribute and by item."""
        return self._config

    def register_to_config(self, **changes: Any) -> None:
        """Replace config values, as pipelines do (diffusers: ConfigMixin.register_to_config)."""
        object.__setattr__(self, "_config", FrozenConfig({**self._config, **changes}))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first floating-point parameter."""
        return next(p.dtype for p in self.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """The device of the first parameter."""
        return next(self.parameters()).device

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether any block recomputes its activations in the backward pass."""
        return any(getattr(m, "gradient_checkpointing", False) for m in self.modules())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block's activations in the backward pass instead of keeping them."""
        self._set_gradient_checkpointing(True)

    def disable_gradient_checkpointing(self) -> None:
        """Keep activations for the backward pass again."""
        self._set_gradient_checkpointing(False)

    def _set_gradient_checkpointing(self, enabled: bool) -> None:
        for module in self.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = enabled  # type: ignore[assignment]
                module._gradient_checkpointing_func = functools.partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
