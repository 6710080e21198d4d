"""fastvae.accelerate and restore: put the fast path on a VAE of this structure, and remove it.

Only ``forward`` of the encoder and of the decoder is replaced, on the instance, as a bound method of the same name, and
the model's ``enable_tiling`` and ``disable_tiling``. So type, state dict, deepcopy, hooks and saving do not change, and
a pickled copy is stock.
Fallbacks are checked at every call (survey.py), and decided again (fallback_reasons.py) when a layer, a hook or the
place of a weight has changed, so weights may change device, dtype or value afterwards.
"""

from __future__ import annotations

import contextlib
import threading
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

from torch import nn

from fastvae.fast import copying, fallback_reasons, layer_checks
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath
from fastvae.fast.tiled import switches
from fastvae.latents.autoencoder import ACCELERATED, described_model
from fastvae.latents.interpreter import INTERPRETER_IGNORED

Model = TypeVar("Model")
# Held while forwards are replaced. A call takes no lock: it finds either the one forward or the other.
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
    """Put a VAE, or the VAE of a pipeline, on the fast path, in place; return the same object.

    vae_or_pipe: fastvae's or diffusers' AutoencoderKL, any module whose ``encoder`` or ``decoder`` has its structure
    (AutoencoderKLFlux2, the encoder of AsymmetricAutoencoderKL), or an object with such a ``vae``; also inside the
    wrappers of torch.compile and DistributedDataParallel. Replicas of DataParallel run as modules.
    precision: "fast" takes every rewrite that is exact in real arithmetic; "exact" keeps eager's bits.
    deterministic: row i of a batch has the bits that it has alone; convolutions run image by image. In the model's own
    ``encode`` and ``decode`` this covers the encoder and the decoder only; encode_latents and decode_latents also cover
    quant_conv and post_quant_conv.
    graphs: replay a captured CUDA graph from the second call of a shape on. For small batches on a GPU; no effect
    elsewhere: ``fast_report`` counts ``graph_replays`` and gives the reasons in ``no_graph``.
    compile: encoder and decoder go through torch.compile, each at its first call, which takes a minute; threads then
    take turns. torch.compile chooses summation orders and launches, so the three settings above exclude it.
    freeze: you promise not to change the weights; packed copies are kept (``fast_report`` has their bytes) until
    ``refresh``, and attention may take its shared form.
    ``enable_tiling(exact=True, max_memory="12GiB")`` of the model then encodes and decodes in bands of rows within that
    memory, with the bits of the whole image (docs/memory.md); on a CPU, until ``restore``.
    A second call replaces the settings of the first. There is no second derivative: a gradient of a gradient raises
    RuntimeError.
    Raises ValueError for another precision or settings that exclude each other, and TypeError if neither an encoder nor
    a decoder of this structure is found.
    """
    if precision not in ("fast", "exact"):
        raise ValueError(f"precision must be 'fast' or 'exact', got {precision!r}")
    asked = {"precision='exact'": precision == "exact", "deterministic=True": deterministic, "graphs=True": graphs}
    if compile and any(asked.values()):
        raise ValueError(f"compile=True must come without {' and '.join(name for name in asked if asked[name])}")
    vae = vae_of(vae_or_pipe)
    if all(fallback_reasons.why_not_shape(part) is Reason.UNSUPPORTED_LAYER for part in _parts(vae)):
        raise TypeError(f"neither encoder nor decoder of this {type(vae).__name__} is built like AutoencoderKL's")
    if INTERPRETER_IGNORED:
        warnings.warn(
            "TRITON_INTERPRET=1 is for debugging kernels: on a CPU C kernels and torch's operators run instead",
            stacklevel=2,
        )
    path = FastPath(precision, deterministic=deterministic, graphs=graphs, compile=compile, freeze=freeze)
    with LOCK:
        before = vars(vae).get(ACCELERATED)
        if before is not None:
            path.factors = before.factors  # calibrate's result belongs to the model, not to the settings
            path.tiling = before.tiling  # as a tiling of the class does
        _attach(vae, path, _parts(vae))
    return vae_or_pipe


@contextlib.contextmanager
def accelerated(vae_or_pipe: Model, precision: Literal["fast", "exact"] = "fast", **settings: bool) -> Iterator[Model]:
    """Context manager that accelerates inside its block only; yields ``vae_or_pipe``.

    Takes the arguments of ``accelerate``. On exit, also by an exception, the model is again as it was on entry: stock,
    or accelerated with the settings, counts and packed copies it had. Nested blocks must be left in reverse order. The
    settings are the model's, not the thread's. Raises what ``accelerate`` raises, before it changes anything.
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
            _detach(vae, *_parts(vae), *inside)  # a part may have been replaced inside the block
            if before is not None:
                _attach(vae, before, fast_before)


def _attach(vae: nn.Module, path: FastPath, parts: Iterable[nn.Module]) -> None:
    _detach(vae, *_parts(vae))
    vars(vae)[ACCELERATED] = path
    switches.attach(vae)
    for part in parts:
        if fallback_reasons.why_not_shape(part) is None and _replace_forward(part):
            vars(part)[ACCELERATED] = path
            copying.attach(part)


def restore(vae_or_pipe: Model) -> Model:
    """Remove the fast path, so that outputs have the bits from before ``accelerate``; return the same object.

    Has no effect on a model that is not accelerated. Raises TypeError if there is no VAE.
    """
    vae = vae_of(vae_or_pipe)
    with LOCK:
        _detach(vae, *_parts(vae))
    return vae_or_pipe


def _detach(*modules: nn.Module) -> None:
    for module in modules:
        own = vars(module)
        path = own.pop(ACCELERATED, None)
        if path is not None:
            path.surveys.clear()  # they hold the modules, which hold the path
        copying.detach(module)
        switches.detach(module)
        for holder, name in _forward_places(module):
            if _is_bound(forward, holder.get(name)):
                holder[name] = types.MethodType(type(module).forward, module)
        if _is_bound(type(module).forward, own.get("forward")):
            del own["forward"]


def refresh(vae_or_pipe: Model) -> Model:
    """Drop everything computed from frozen weights, after you changed them; return the same object.

    Raises ValueError if the model is not accelerated, and TypeError if there is no VAE.
    """
    path_of(vae_of(vae_or_pipe)).forget()
    return vae_or_pipe


def fast_report(vae_or_pipe: Any) -> dict[str, int | str]:
    """Return counts since ``accelerate``: rows on the fused kernels, rows not finite (fp16), rows redone in fp32.

    Also the bytes of packed copies (not the workspace of a call), ``cpu_kernels`` (the instruction set that the C
    kernels of a CPU were built for, or why they do not run) and log2 of the fp16 factors; with ``graphs`` the number of
    graphs and replays, and why calls took none. Waits for the GPU. Raises ValueError if the model is not accelerated,
    and TypeError if there is no VAE.
    """
    return path_of(vae_of(vae_or_pipe)).report()


def forward(self, sample, *args, **kwargs):
    """Forward of an accelerated encoder or decoder."""
    path = vars(self).get(ACCELERATED)
    if path is None or any(value is not None for value in (*args, *kwargs.values())):
        return type(self).forward(self, sample, *args, **kwargs)
    return path.run(self, sample)


def vae_of(vae_or_pipe: Any) -> nn.Module:
    """Return the VAE itself, or the ``vae`` of a pipeline; raise TypeError if there is none."""
    held = getattr(vae_or_pipe, "vae", None)
    vae = unwrapped(held if isinstance(held, nn.Module) else vae_or_pipe)
    if not isinstance(vae, nn.Module) or not list(_parts(vae)):
        raise TypeError(
            "vae_or_pipe must be a VAE with an encoder or a decoder, or a pipeline with one, got "
            f"{described_model(vae_or_pipe)}"
        )
    return vae


def unwrapped(model: Any) -> Any:
    """Return the module inside wrappers of torch.compile (``_orig_mod``) and of data parallelism (``module``)."""
    while isinstance(model, nn.Module) and list(model._modules) in (["_orig_mod"], ["module"]):
        model = next(model.children())
    return model


def why_not_reached(part: nn.Module, path: FastPath) -> Reason | None:
    """Return why calls of an encoder or decoder do not reach ``path``: its structure, or another forward."""
    reached = any(_is_bound(forward, holder.get(name)) for holder, name in _forward_places(part))
    if vars(part).get(ACCELERATED) is path and reached:
        return None
    if shape := fallback_reasons.why_not_shape(part):
        return shape
    replaced = layer_checks.has_replaced_forward(part)
    return fallback_reasons.who_replaced_forward(part) if replaced else Reason.LATE


def _replace_forward(part: nn.Module) -> bool:
    """Replace the class's own forward, which hooks may wrap, by ours; return False if the forward is another's."""
    own = vars(part)
    if "forward" not in own:
        own["forward"] = types.MethodType(type(part).forward, part)
    places = [
        (holder, name) for holder, name in _forward_places(part) if _is_bound(type(part).forward, holder.get(name))
    ]
    for holder, name in places:
        holder[name] = types.MethodType(forward, part)
    return bool(places)


def _forward_places(module: nn.Module) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (dictionary, name) of a module's forward: on the instance, and inside accelerate's or diffusers' hooks."""
    own = vars(module)
    yield own, "forward"
    if "_hf_hook" in own:
        yield own, "_old_forward"
    for behind in getattr(own.get("_diffusers_hook"), "_fn_refs", ()):
        yield vars(behind), "forward"
        yield vars(behind), "original_forward"


def _is_bound(function: Any, bound: Any) -> bool:
    """Return True if a method is this function, bound to any instance."""
    return getattr(bound, "__func__", None) is function


def path_of(vae: nn.Module) -> FastPath:
    """Return the fast path of an accelerated VAE; raise ValueError if it has none."""
    path = vars(vae).get(ACCELERATED)
    if path is None:
        raise ValueError(f"this {type(vae).__name__} is not accelerated: call fastvae.accelerate on it first")
    return path


def _parts(vae: nn.Module) -> Iterator[nn.Module]:
    for name in ("encoder", "decoder"):
        part = unwrapped(getattr(vae, name, None))
        if isinstance(part, nn.Module):
            yield part
