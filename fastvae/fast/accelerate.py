"""fastvae.accelerate and restore: the fast path put in place, on any VAE of this shape, and taken away again.

The modules stay what they are: an encoder's and a decoder's ``forward`` is replaced on the instance, under its own name
and as a bound method, so type, state dict, deepcopy, hooks and saving see nothing, and a pickled copy comes back stock.
What every call does hangs on what it finds then (reasons.py); weights may move, be recast and change in place.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import nn

from fastvae.fast import layers, reasons
from fastvae.fast.path import FastPath
from fastvae.fast.reasons import Reason
from fastvae.latents import ACCELERATED

Model = TypeVar("Model")


def accelerate(
    vae_or_pipe: Model,
    precision: Literal["fast", "exact"] = "fast",
    *,
    deterministic: bool = False,
    graphs: bool = False,
    freeze: bool = False,
) -> Model:
    """Let a VAE, or the VAE of a pipeline, compute on the fast path from now on; the same object is returned.

    vae_or_pipe: fastvae's or diffusers' AutoencoderKL, or any module whose ``encoder`` or ``decoder`` is built alike
    (AutoencoderKLFlux2, the encoder of AsymmetricAutoencoderKL), or an object with such a ``vae``.
    precision: "fast" takes every rewrite that is exact in real arithmetic; "exact" only what keeps eager's bits.
    deterministic: row i of a batch gets the bits that it gets alone; convolutions then run image by image.
    graphs: from the second call of a shape on replay a captured CUDA graph; for small batches on a GPU, and without
    effect elsewhere, of which ``fast_report`` tells (``graph_replays``, and ``no_graph`` in words).
    freeze: you promise that the weights stay as they are; packed copies are kept (``fast_report`` states their bytes)
    until ``refresh``, and attention may take its shared form.
    Gradients are given once; a gradient of a gradient raises RuntimeError, where eager without attention has one.
    Raises ValueError for another precision, and TypeError where there is no encoder and no decoder of this shape.
    """
    if precision not in ("fast", "exact"):
        raise ValueError(f"precision must be 'fast' or 'exact', got {precision!r}")
    vae = vae_of(vae_or_pipe)
    if all(reasons.of_shape(part) is Reason.UNSUPPORTED_LAYER for part in _parts(vae)):
        raise TypeError(f"neither encoder nor decoder of this {type(vae).__name__} is built like AutoencoderKL's")
    before = vars(vae).get(ACCELERATED)
    restore(vae)
    path = FastPath(precision, deterministic=deterministic, graphs=graphs, freeze=freeze)
    if before is not None:
        path.factors = before.factors  # what calibrate found is the model's, whatever the settings
    vars(vae)[ACCELERATED] = path
    for part in _parts(vae):
        if reasons.of_shape(part) is None and not layers.replaced(part):
            vars(part)[ACCELERATED] = path
            vars(part)["forward"] = types.MethodType(forward, part)
    return vae_or_pipe


def restore(vae_or_pipe: Model) -> Model:
    """Take the fast path away: the outputs are those of before ``accelerate``, to the bit. The object is returned.

    Nothing happens to a model that is not accelerated. Raises TypeError for what is no VAE and holds none.
    """
    vae = vae_of(vae_or_pipe)
    for module in (vae, *_parts(vae)):
        own = vars(module)
        own.pop(ACCELERATED, None)
        # A hook that came later keeps our forward as the one it wraps.
        for name in ("forward", "_old_forward"):
            if _is_ours(own.get(name)):
                del own[name]
                if name == "_old_forward":
                    own[name] = types.MethodType(type(module).forward, module)
    return vae_or_pipe


def refresh(vae_or_pipe: Model) -> Model:
    """Forget what was derived from frozen weights: call it after you changed them. The object is returned.

    Raises ValueError for a model that is not accelerated, and TypeError for what is no VAE and holds none.
    """
    path_of(vae_of(vae_or_pipe)).forget()
    return vae_or_pipe


def fast_report(vae_or_pipe: Any) -> dict[str, int | str]:
    """Rows that took the fused kernels since ``accelerate``, those not finite (fp16), those done again in fp32; the
    bytes of packed copies, the factors of fp16 as binary logarithms; with ``graphs`` graphs, replays, and why there was
    none.

    Reading it waits for the GPU. Raises ValueError for a model that is not accelerated, and TypeError for what is no
    VAE and holds none.
    """
    return path_of(vae_of(vae_or_pipe)).report()


def forward(self, sample, *args, **kwargs):
    """Stands for an encoder's or a decoder's own forward while its model is accelerated."""
    path = vars(self).get(ACCELERATED)
    if path is None or any(value is not None for value in (*args, *kwargs.values())):
        return type(self).forward(self, sample, *args, **kwargs)
    return path.run(self, sample)


def vae_of(vae_or_pipe: Any) -> nn.Module:
    """The VAE itself, or the one that a pipeline holds as ``vae``; TypeError where there is none."""
    held = getattr(vae_or_pipe, "vae", None)
    vae = held if isinstance(held, nn.Module) else vae_or_pipe
    if not isinstance(vae, nn.Module) or not list(_parts(vae)):
        raise TypeError(
            f"fastvae takes a VAE with an encoder or a decoder, or a pipeline with one, got a "
            f"{type(vae_or_pipe).__module__}.{type(vae_or_pipe).__name__}"
        )
    return vae


def out_of_reach(part: nn.Module, path: FastPath) -> Reason | None:
    """Why calls of an encoder or a decoder do not come to ``path``: its shape, or somebody's forward before ours."""
    own = vars(part)
    found = [own.get("forward")]
    # What hooks that came later have put behind their own.
    if "_hf_hook" in own:
        found.append(own.get("_old_forward"))
    for behind in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        found += [behind.forward, behind.original_forward]
    if own.get(ACCELERATED) is path and any(_is_ours(function) for function in found):
        return None
    return reasons.of_shape(part) or layers.behind(part)


def _is_ours(function: Any) -> bool:
    return getattr(function, "__func__", None) is forward


def path_of(vae: nn.Module) -> FastPath:
    """The fast path of an accelerated VAE; ValueError for another."""
    path = vars(vae).get(ACCELERATED)
    if path is None:
        raise ValueError(f"this {type(vae).__name__} is not accelerated: call fastvae.accelerate on it first")
    return path


def _parts(vae: nn.Module) -> Iterator[nn.Module]:
    for name in ("encoder", "decoder"):
        part = getattr(vae, name, None)
        if isinstance(part, nn.Module):
            yield part
