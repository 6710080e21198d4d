"""An autoencoder stage by stage, from pixels to pixels: on the fast path, or layer by layer in eager torch.

A stage is the output of the first convolution, of a block, of the last convolution, of quant_conv or of the posterior.
Only the activation is kept between stages, so several models can run side by side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvae.fast import fallback_reasons, layer_checks, network_walk
from fastvae.fast.accelerate import unwrapped
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation
from fastvae.fast.packed_weights import is_channels_last
from fastvae.latents.logvar_range import LOGVAR_RANGE


class Eager:
    """A pass that calls the layers of a part, with the methods of network_walk.Pass that stages need."""

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(part.conv_in(x))

    def block(self, part: Layer, block: Layer, activation: Activation) -> Activation:
        return Activation(layer_checks.as_module(block, activation.x))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        return part.conv_out(part.conv_act(part.conv_norm_out(activation.x)))


def run_stages(vae: Any, x: Tensor, path: FastPath | None) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, values) of every stage for pixels x [1, C, H, W]; the last is the image of the posterior's mode.

    path: the fast path, or None for eager torch. Use the values before asking for the next stage, which may overwrite
    them.
    """
    encoder = yield from _through_part("encoder", unwrapped(vae.encoder), x, path)
    moments = encoder
    if getattr(vae, "quant_conv", None) is not None:
        moments = vae.quant_conv(encoder)
        yield "quant_conv", moments
    mean, logvar = moments.chunk(2, dim=1)
    mean = mean.contiguous()
    yield "posterior.mean", mean
    yield "posterior.std", logvar.clamp(*LOGVAR_RANGE).mul(0.5).exp()
    if getattr(vae, "post_quant_conv", None) is not None:
        mean = vae.post_quant_conv(mean)
        yield "post_quant_conv", mean
    yield from _through_part("decoder", unwrapped(vae.decoder), mean, path)


def stage_path(path: FastPath, part: Layer, x: Tensor) -> str:
    """Return the path of a part for this input without a gradient, as explain: the reason instead of "module"."""
    reason = _reason(path, part, x)
    way = path.way(part, x, reason)
    return f"{reason.name}: {reason.value}" if reason is not None and way == "module" else way


def _reason(path: FastPath, part: Layer, x: Tensor) -> Reason | None:
    return fallback_reasons.why_not_shape(part) or path.why_not(part, x)


def _through_part(
    name: str, part: Layer, x: Tensor, path: FastPath | None
) -> Generator[tuple[str, Tensor], None, Tensor]:
    if fallback_reasons.why_not_shape(part) is not None:  # a module of another shape has only its result
        y = part(x)
        yield name, y
        return y
    names = {id(module): f"{name}.{inner}" for inner, module in part.named_modules()}
    run = _pass(path, part, x)
    activation = run.begin(part, x)
    yield f"{name}.conv_in", _values(run, activation)
    for block in network_walk.blocks_of(part):
        activation = run.block(part, block, activation)
        yield names[id(block)], _values(run, activation)
    y = run.end(part, activation)
    # In the layout of the input, as FastPath.run returns it: the bits of a following 1x1 convolution depend on it.
    y = y if isinstance(run, Eager) or is_channels_last(x) else y.contiguous()
    yield f"{name}.conv_out", y
    return y


def _pass(path: FastPath | None, part: Layer, x: Tensor) -> Any:
    kind = "eager" if path is None else stage_path(path, part, x)
    if path is None or kind not in ("fused", "cpu"):
        return Eager()
    return path.pass_for(part, x) if kind == "fused" else path.cpu_pass(x.device)


def _values(run: Any, activation: Activation) -> Tensor:
    """Return the values of an activation, which fused passes hold times a power of two and without its bias."""
    stream = getattr(run, "stream_factor", 1.0)
    if stream == 1.0 and activation.bias is None:
        return activation.x
    x = activation.x.to(torch.float64) / stream
    return x if activation.bias is None else x + activation.bias.to(torch.float64).view(-1, 1, 1)
