"""An autoencoder one stage after another, from pixels to pixels: on the fast path, or layer by layer as torch runs it.

A stage is what comes out of the first convolution, of a block, of the last convolution, of quant_conv and of the
posterior. Nothing is held between them but the activation, so several models can go side by side.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from fastvae.fast import fallback_reasons, layer_checks, network_walk
from fastvae.fast.accelerate import unwrapped
from fastvae.fast.cpu_pass import CpuPass
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath
from fastvae.fast.layer_checks import Layer
from fastvae.fast.network_walk import Activation
from fastvae.fast.packed_weights import is_channels_last
from fastvae.latents.logvar_range import LOGVAR_RANGE


class Eager:
    """A pass of the layers as they stand. (network_walk.Pass, as far as stages go.)"""

    def begin(self, part: Layer, x: Tensor) -> Activation:
        return Activation(part.conv_in(x))

    def block(self, part: Layer, block: Layer, activation: Activation) -> Activation:
        return Activation(layer_checks.as_module(block, activation.x))

    def end(self, part: Layer, activation: Activation) -> Tensor:
        return part.conv_out(part.conv_act(part.conv_norm_out(activation.x)))


def run_stages(vae: Any, x: Tensor, path: FastPath | None) -> Iterator[tuple[str, Tensor]]:
    """(name, values) of every stage for pixels x [1, C, H, W], the last one the image of the posterior's mode.

    path: the fast path to take, or None for the layers as they stand. Values must be looked at before the next stage
    is asked for, which may be written in their memory.
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


def stage_kind(path: FastPath, part: Layer, x: Tensor) -> str:
    """How a part goes through ``path`` for this input: "fused", "in place", or why it runs as it stands."""
    reason = _reason(path, part, x)
    if reason is None:
        return "fused"
    return "in place" if reason is Reason.CPU and x.device.type == "cpu" else f"{reason.name}: {reason.value}"


def _reason(path: FastPath, part: Layer, x: Tensor) -> Reason | None:
    return fallback_reasons.why_not_shape(part) or path.why_not(part, x)


def _through_part(
    name: str, part: Layer, x: Tensor, path: FastPath | None
) -> Generator[tuple[str, Tensor], None, Tensor]:
    if fallback_reasons.why_not_shape(part) is not None:  # of a module of another shape the result alone is known
        y = part(x)
        yield name, y
        return y
    names = {id(module): f"{name}.{inner}" for inner, module in part.named_modules()}
    run = _pass(path, part, x)
    activation = run.begin(part, x)
    yield f"{name}.conv_in", _whole(run, activation)
    for block in network_walk.blocks_of(part):
        activation = run.block(part, block, activation)
        yield names[id(block)], _whole(run, activation)
    y = run.end(part, activation)
    # In the layout of the input, as FastPath.run hands it on: a 1x1 convolution behind it has other bits in another.
    y = y if isinstance(run, Eager) or is_channels_last(x) else y.contiguous()
    yield f"{name}.conv_out", y
    return y


def _pass(path: FastPath | None, part: Layer, x: Tensor) -> Any:
    kind = "as it stands" if path is None else stage_kind(path, part, x)
    if path is None or kind not in ("fused", "in place"):
        return Eager()
    return path.pass_for(part, x) if kind == "fused" else CpuPass(path.packed)


def _whole(run: Any, activation: Activation) -> Tensor:
    """What a activation stands for: the fused passes carry it times a power of two, and its bias beside it."""
    stream = getattr(run, "stream_factor", 1.0)
    if stream == 1.0 and activation.bias is None:
        return activation.x
    x = activation.x.to(torch.float64) / stream
    return x if activation.bias is None else x + activation.bias.to(torch.float64).view(-1, 1, 1)
