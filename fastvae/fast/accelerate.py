"""fastvae.accelerate and restore: the fast path put in place, on any VAE of this shape, and taken away again.

The modules stay what they are: an encoder's and a decoder's ``forward`` is replaced on the instance, under its own name
and as a bound method, so type, state dict, deepcopy, hooks and saving see nothing, and a pickled copy comes back stock.
What every call does hangs on what it finds then (reasons.py); weights may move, be recast and change in place.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from torch import nn

from fastvae.fast import copying as copies
from fastvae.fast import fallback_reasons as reasons
from fastvae.fast import layer_checks as layers
from fastvae.fast.fast_path import FastPath
from fastvae.fast.layer_checks import Reason
from fastvae.latents.autoencoder import ACCELERATED

Model = TypeVar("Model")
# Held while forwards are exchanged: calls need none, since each finds either the one or the other.
LOCK = threading.RLock()


def accelerate(
    vae_or_pipe: Model,
    precision: Literal["fast", "exact"] = "fast",
    *,
    deterministic: bool = False,
    graphs: bool = False,
    compile: bool = False,
    freeze: bool = False,
) -> Model:
    """Let a VAE, or the VAE of a pipeline, compute on the fast path from now on; the same object is returned.

    vae_or_pipe: fastvae's or diffusers' AutoencoderKL, or any module whose ``encoder`` or ``decoder`` is built alike
    (AutoencoderKLFlux2, the encoder of AsymmetricAutoencoderKL), or an object with such a ``vae``; also inside the
    wrappers of torch.compile and DistributedDataParallel. The replicas that DataParallel makes run as they stand.
    precision: "fast" takes every rewrite that is exact in real arithmetic; "exact" only what keeps eager's bits.
    deterministic: row i of a batch gets the bits that it gets alone; convolutions then run image by image. In the
    model's own ``encode`` and ``decode`` that is encoder and decoder alone; encode_latents and decode_latents hold
    quant_conv and post_quant_conv to it too.
    graphs: from the second call of a shape on replay a captured CUDA graph; for small batches on a GPU, and without
    effect elsewhere, of which ``fast_report`` tells (``graph_replays``, and ``no_graph`` in words).
    compile: encoder and decoder go through torch.compile, each at its first call, which takes a minute; threads then
    take turns. It chooses orders of summation and launches itself, so it goes with none of the three before.
    freeze: you promise that the weights stay as they are; packed copies are kept (``fast_report`` states their bytes)
    until ``refresh``, and attention may take its shared form.
    Called again, the settings are those of the last call. Gradients are given once; a gradient of a gradient raises
    RuntimeError, where eager without attention has one.
    Raises ValueError for another precision or settings that exclude each other, and TypeError where there is no encoder
    and no decoder of this shape.
    """
    if precision not in ("fast", "exact"):
        raise ValueError(f"precision must be 'fast' or 'exact', got {precision!r}")
    asked = {"precision='exact'": precision == "exact", "deterministic=True": deterministic, "graphs=True": graphs}
    if compile and any(asked.values()):
        raise ValueError(f"compile=True must come without {' and '.join(name for name in asked if asked[name])}")
    vae = vae_of(vae_or_pipe)
    if all(reasons.why_not_shape(part) is Reason.UNSUPPORTED_LAYER for part in _parts(vae)):
        raise TypeError(f"neither encoder nor decoder of this {type(vae).__name__} is built like AutoencoderKL's")
    path = FastPath(precision, deterministic=deterministic, graphs=graphs, compile=compile, freeze=freeze)
    with LOCK:
        before = vars(vae).get(ACCELERATED)
        if before is not None:
            path.factors = before.factors  # what calibrate found is the model's, whatever the settings
        _put_in_place(vae, path, _parts(vae))
    return vae_or_pipe


@contextlib.contextmanager
def accelerated(vae_or_pipe: Model, precision: Literal["fast", "exact"] = "fast", **settings: bool) -> Iterator[Model]:
    """``with fastvae.accelerated(vae):`` accelerates inside the block alone; ``vae_or_pipe`` is what it gives.

    The arguments are those of ``accelerate``. After the block, left by an exception or not, the model is as it was
    before: stock, or accelerated with what settings, counts and packed copies it had. Blocks may be nested, and must be
    left in reverse order: each restores what it found when it was entered. The settings are the model's and not the
    thread's. Raises what ``accelerate`` raises, before anything has changed.
    """
    vae = vae_of(vae_or_pipe)
    with LOCK:
        before = vars(vae).get(ACCELERATED)
        fast_before = [part for part in _parts(vae) if vars(part).get(ACCELERATED) is before]
        accelerate(vae, precision, **settings)
        inside = list(_parts(vae))
    try:
        yield vae_or_pipe
    finally:
        with LOCK:
            _take_off(vae, *_parts(vae), *inside)  # a part may have been exchanged inside the block
            if before is not None:
                _put_in_place(vae, before, fast_before)


def _put_in_place(vae: nn.Module, path: FastPath, parts: Iterable[nn.Module]) -> None:
    _take_off(vae, *_parts(vae))
    vars(vae)[ACCELERATED] = path
    for part in parts:
        if reasons.why_not_shape(part) is None and _put_beneath_hooks(part):
            vars(part)[ACCELERATED] = path
            copies.attach(part)


def restore(vae_or_pipe: Model) -> Model:
    """Take the fast path away: the outputs are those of before ``accelerate``, to the bit. The object is returned.

    Nothing happens to a model that is not accelerated. Raises TypeError for what is no VAE and holds none.
    """
    vae = vae_of(vae_or_pipe)
    with LOCK:
        _take_off(vae, *_parts(vae))
    return vae_or_pipe


def _take_off(*modules: nn.Module) -> None:
    for module in modules:
        own = vars(module)
        own.pop(ACCELERATED, None)
        copies.detach(module)
        for holder, name in _places(module):
            if _is(forward, holder.get(name)):
                holder[name] = types.MethodType(type(module).forward, module)
        if _is(type(module).forward, own.get("forward")):
            del own["forward"]


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
    vae = unwrapped(held if isinstance(held, nn.Module) else vae_or_pipe)
    if not isinstance(vae, nn.Module) or not list(_parts(vae)):
        raise TypeError(
            f"fastvae takes a VAE with an encoder or a decoder, or a pipeline with one, got a "
            f"{type(vae_or_pipe).__module__}.{type(vae_or_pipe).__name__}"
        )
    return vae


def unwrapped(model: Any) -> Any:
    """What torch.compile's and torch's data-parallel wrappers call, which keep it as ``_orig_mod`` or ``module``."""
    while isinstance(model, nn.Module) and list(model._modules) in (["_orig_mod"], ["module"]):
        model = next(model.children())
    return model


def out_of_reach(part: nn.Module, path: FastPath) -> Reason | None:
    """Why calls of an encoder or a decoder do not come to ``path``: its shape, or somebody's forward before ours."""
    reached = any(_is(forward, holder.get(name)) for holder, name in _places(part))
    if vars(part).get(ACCELERATED) is path and reached:
        return None
    late = Reason.LATE if not layers.replaced(part) else layers.behind(part)
    return reasons.why_not_shape(part) or late


def _put_beneath_hooks(part: nn.Module) -> bool:
    """Our forward in the place of the class's own, which hooks may wrap; False where another's stands there."""
    own = vars(part)
    if "forward" not in own:
        own["forward"] = types.MethodType(type(part).forward, part)
    places = [(holder, name) for holder, name in _places(part) if _is(type(part).forward, holder.get(name))]
    for holder, name in places:
        holder[name] = types.MethodType(forward, part)
    return bool(places)


def _places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Where a module's forward may be kept: on the instance, and by accelerate's and diffusers' hooks behind theirs."""
    own = vars(module)
    yield own, "forward"
    if "_hf_hook" in own:
        yield own, "_old_forward"
    for behind in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        yield vars(behind), "forward"
        yield vars(behind), "original_forward"


def _is(function: Any, bound: Any) -> bool:
    """Whether a method is this function, bound to whatever instance."""
    return getattr(bound, "__func__", None) is function


def path_of(vae: nn.Module) -> FastPath:
    """The fast path of an accelerated VAE; ValueError for another."""
    path = vars(vae).get(ACCELERATED)
    if path is None:
        raise ValueError(f"this {type(vae).__name__} is not accelerated: call fastvae.accelerate on it first")
    return path


def _parts(vae: nn.Module) -> Iterator[nn.Module]:
    for name in ("encoder", "decoder"):
        part = unwrapped(getattr(vae, name, None))
        if isinstance(part, nn.Module):
            yield part
