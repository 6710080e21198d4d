"""Behaviour of a model as the ``vae`` of a diffusers pipeline: offload hooks run, and silent failures are refused.

Source: diffusers.utils.accelerate_utils.apply_forward_hook.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

REFUSALS = {
    "save_pretrained": (
        "a pipeline saves only diffusers' classes and would leave this vae out: use diffusers' AutoencoderKL instead "
        "(fastvae.accelerate makes it as fast), or save this one separately, with vae.save_pretrained"
    ),
    "maybe_raise_or_warn": (
        "a pipeline's from_pretrained takes diffusers' AutoencoderKL as vae and not fastvae's: load it without one and "
        "call fastvae.accelerate on it, or set its vae afterwards"
    ),
}
"""Messages by the function of diffusers' pipelines that does not support fastvae's classes."""


class InPipelines:
    """Mixin that raises ValueError for calls of diffusers' pipelines that would leave the model out."""

    def __format__(self, specification: str) -> str:
        # Why the caller's frame: diffusers calls nothing else of a class that it does not know. save_pretrained formats
        # the model into a logged line and writes the pipeline without it; maybe_raise_or_warn formats it into an error
        # that names two classes. Any other caller gets the usual text.
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").startswith("diffusers.pipelines.") and (
            refusal := REFUSALS.get(caller.f_code.co_name)
        ):
            raise ValueError(refusal)
        return super().__format__(specification)


def heeds_offload(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Return ``method`` preceded by accelerate's offload hook, which moves the model to its device, as for forward."""

    @functools.wraps(method)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0]
        hook = vars(model).get("_hf_hook")
        if hook is not None:
            hook.pre_forward(model)
        return method(*args, **kwargs)

    return wrapper
