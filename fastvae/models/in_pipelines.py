"""What a model of ours needs to be a diffusers pipeline's ``vae``: offload hooks are heard, and losses are refused.

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
        "a pipeline saves diffusers' classes alone and would leave this vae out: put diffusers' AutoencoderKL in its "
        "place (fastvae.accelerate makes it as fast), or save this one by itself, with vae.save_pretrained"
    ),
    "maybe_raise_or_warn": (
        "a pipeline's from_pretrained takes diffusers' AutoencoderKL as vae and not fastvae's: load it without one and "
        "call fastvae.accelerate on it, or set its vae afterwards"
    ),
}
"""By the function of diffusers' pipelines that finds no use for a class of ours."""


class InPipelines:
    """A model that refuses in words where diffusers' pipelines would go on without it."""

    def __format__(self, specification: str) -> str:
        # Those functions ask nothing of a class that they do not know: one logs a line and saves the rest, the other
        # names two classes in an error. Both put the model into their text first, and that is where we are told.
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").startswith("diffusers.pipelines.") and (
            refusal := REFUSALS.get(caller.f_code.co_name)
        ):
            raise ValueError(refusal)
        return super().__format__(specification)


def heeds_offload(method: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let accelerate's offload hook bring the model to its device before ``method``, as it does before ``forward``."""

    @functools.wraps(method)
    def wrapper(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        model: Any = args[0]
        hook = vars(model).get("_hf_hook")
        if hook is not None:
            hook.pre_forward(model)
        return method(*args, **kwargs)

    return wrapper
