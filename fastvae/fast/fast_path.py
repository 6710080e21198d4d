"""What an accelerated VAE carries: its settings, what was derived from frozen weights, and what it counted."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastvae.fast import compiled_passes as compiled
from fastvae.fast import fallback_reasons as reasons
from fastvae.fast import network_walk as walk
from fastvae.fast.compiled_passes import Compiled
from fastvae.fast.counters import DeviceCounters
from fastvae.fast.cpu_pass import InPlace
from fastvae.fast.cuda_graphs import Graphs
from fastvae.fast.inference_pass import Inference
from fastvae.fast.layer_checks import Layer, Reason
from fastvae.fast.packed_weights import PackedWeights, channels_last, is_channels_last
from fastvae.fast.training_pass import Training
from fastvae.latents.autoencoder import ACCELERATED, like_weights
from fastvae.latents.pixels import normalized


class Factors(NamedTuple):
    """The powers of two that the fp16 activations of an encoder or a decoder are carried times."""

    stream: float = 2.0**-6
    """The residual stream: up to 65,504 * 2^6 = 4.2 million fits, and SDXL's decoder reaches some 10^5."""
    inner: float = 2.0**-6
    """What lies between conv1 and norm2. What either factor costs: values below 2^-14 * 2^6 = 0.004 keep an error of up
    to 2^-25 * 2^6 = 1.9e-6, where fp16 alone would round them relative to themselves (docs/numerics.md)."""


UNSCALED = Factors(1.0, 1.0)


class FastPath:
    """The settings of one ``accelerate``, shared by a VAE and its parts."""

    def __init__(
        self, precision: str = "fast", *, deterministic: bool, graphs: bool, freeze: bool, compile: bool = False
    ):
        self.precision = precision
        self.deterministic = deterministic
        self.graphs = Graphs() if graphs else None
        self.compiled = Compiled() if compile else None
        self.factors = {"encoder": Factors(), "decoder": Factors()}
        self.derived = PackedWeights(frozen=freeze)
        self.counts: dict[str, Any] = {"rows": 0, "rows_again_in_fp32": 0}
        self.tally = DeviceCounters()

    def __reduce__(self):
        # A pickled model comes back stock: bound methods are found by name, and that is the class's own.
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> FastPath:
        twin = FastPath.__new__(FastPath)
        memo[id(self)] = twin
        # What is derived is not copied: its keys are the modules of the whole VAE, and the copy may be of one part.
        derived = {id(self.derived): PackedWeights(self.derived.frozen)}
        vars(twin).update(copy.deepcopy(vars(self), memo | derived))
        return twin

    def forget(self) -> None:
        """Drop all that hangs on the weights."""
        if self.graphs is not None:
            self.graphs.clear()  # first: they read what was derived
        if self.compiled is not None:
            self.compiled.clear()
        self.derived.clear()

    def why_not(self, part: Layer, x: Tensor) -> Reason | None:
        """Why this call runs the part's own forward."""
        if self.precision == "exact":
            return Reason.EXACT
        return reasons.why_not_part(part) or reasons.why_not_input(part, x)

    def pass_for(self, part: Layer, x: Tensor, quant_conv: Layer | None = None) -> walk.Pass:
        """The pass that this call takes: with a gradient where one is needed."""
        if reasons.needs_gradient(part, x):
            return Training()
        half = part.conv_in.weight.dtype == torch.float16
        factors = self.factors[part_name(part)] if half else UNSCALED
        return Inference(self.derived, deterministic=self.deterministic, quant_conv=quant_conv, **factors._asdict())

    def run(self, part: Layer, x: Tensor) -> Tensor:
        """The part's output for x, on the fast path where it can; its rows are counted, and not looked at."""
        if self.compiled is not None and compiled.by_itself():
            return self.compiled.call(self._run, part, x)
        return self._run(part, x)

    def _run(self, part: Layer, x: Tensor) -> Tensor:
        reason = self.why_not(part, x)
        if not x.is_floating_point():
            return type(part).forward(part, x)  # refused in torch's words, as ever: encode_latents takes bytes
        if reason is None:
            return self._walked(part, x)
        if self.graphs is not None and not torch.compiler.is_compiling():
            self.graphs.plain[reason] += 1
        if reason is Reason.CPU and x.device.type == "cpu":
            # No kernel here wins; channels_last does, and so does memory that is used again. A trace wants torch's ops.
            if reasons.needs_gradient(part, x) or not compiled.by_itself():
                y = type(part).forward(part, channels_last(x))
            else:
                rows = x.split(1) if self.deterministic else (x,)
                done = [walk.run_part(part, row, InPlace(self.derived)) for row in rows]
                y = torch.cat(done) if len(done) > 1 else done[0]
            return y if is_channels_last(x) else y.contiguous()
        return type(part).forward(part, x)

    def _walked(self, part: Layer, x: Tensor, quant_conv: Layer | None = None) -> Tensor:
        """The part's output by the fused kernels, with its rows counted; from a graph where there is one."""
        run = self.pass_for(part, x, quant_conv)

        def work(x: Tensor) -> Tensor:
            y = walk.run_part(part, x, run)
            return y if is_channels_last(x) else y.contiguous()

        if torch.compiler.is_compiling():
            y = work(x)
            # A number kept here would be guarded by its value: one compilation for each call.
            self.tally.add(y, rows=y.shape[0])
            return y
        self.counts["rows"] += x.shape[0]
        if self.graphs is not None:
            return self.graphs.run(part, x, run, work, self.tally.add)
        y = work(x)
        self.tally.add(y)
        return y

    def moments(self, vae: Any, x: Tensor, *, again_in_fp32: bool = False) -> Tensor:
        """Mean and log-variance [B, 2L, h, w] of pixels x [B, C, H, W], uint8 or floats in [-1, 1].

        quant_conv and conv_out are one convolution where nothing hangs on either. again_in_fp32: rows of half
        precision that are not finite are done again in fp32; this waits for the result.
        """
        encoder, quant_conv = vae.encoder, getattr(vae, "quant_conv", None)
        if encoder is None:
            return vae.encode(x).latent_dist.parameters  # which says so
        whole = not (getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False))
        walked = whole and vars(encoder).get(ACCELERATED) is self and self.why_not(encoder, x) is None
        if not walked or reasons.needs_gradient(encoder, x) or reasons.why_not_quant_conv(vae):
            moments = self._each(lambda x: vae.encode(x).latent_dist.parameters, _as_floats(encoder, x))
        elif self.compiled is not None and compiled.by_itself():
            moments = self.compiled.call(self._walked, encoder, x, quant_conv)
        else:
            moments = self._walked(encoder, x, quant_conv)
        return self.mended(vae, x, moments) if again_in_fp32 else moments

    def mended(self, vae: Any, x: Tensor, moments: Tensor) -> Tensor:
        """``moments`` of pixels ``x`` with the rows of half precision that are not finite done again in fp32, and no
        others; this waits for the result."""

        def again(wide: Any, row: slice) -> Tensor:
            return wide.encode(_as_floats(wide.encoder, x[row])).latent_dist.parameters

        return self._mended(moments, vae, "decoder", again)

    def images(self, vae: Any, z: Tensor) -> Tensor:
        """Images [B, C, H, W] of raw latents z [B, L, h, w], with the rows of half precision that are not finite done
        again in fp32; this waits for the result."""
        y = self._each(lambda z: vae.decode(z).sample, z)
        return self._mended(y, vae, "encoder", lambda wide, row: wide.decode(z[row].float()).sample)

    def _each(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``call`` of x [B, ...], image by image where that was asked for: the model's own 1x1 convolutions beside
        encoder and decoder hang on the batch too (in fp32 on a CPU from 24 images of 64x64 on)."""
        if not self.deterministic or x.shape[0] < 2:
            return call(x)
        return torch.cat([call(row) for row in x.split(1)])

    def _mended(self, y: Tensor, vae: Any, unused: str, again: Callable[[Any, slice], Tensor]) -> Tensor:
        """y [B, ...] with the rows that are not finite from ``again``, which is handed an fp32 copy of vae."""
        bad = (~y.isfinite().flatten(1).all(1)).nonzero().flatten()
        if y.dtype == torch.float32 or not len(bad):
            return y
        self.counts["rows_again_in_fp32"] += len(bad)
        # The memo leaves out the part that is not called, and this path: the copy runs its modules as they stand.
        wide = copy.deepcopy(vae, {id(self): None, id(getattr(vae, unused, None)): None}).float()
        # One after another: a batch that fills the GPU in half precision does not fit there in fp32.
        exact = torch.cat([again(wide, slice(row, row + 1)) for row in bad.tolist()])
        return y.index_copy(0, bad, exact.to(y.dtype))

    def report(self) -> dict[str, int | str]:
        """The counts, the bytes of packed copies, and the factors that fp16 is carried times, as powers of two."""
        factors = {
            f"{part}_{name}_log2": int(math.log2(factor))
            for part, pair in self.factors.items()
            for name, factor in pair._asdict().items()
        }
        return {
            **self.counts,
            "rows": self.counts["rows"] + self.tally.rows(),
            "non_finite_rows": self.tally.non_finite_rows(),
            "packed_bytes": self.derived.bytes(),
            **factors,
            **({} if self.graphs is None else self.graphs.report()),
        }


def part_name(part: Layer) -> str:
    """Under which name a VAE holds this part."""
    return "encoder" if hasattr(part, "down_blocks") else "decoder"


def _as_floats(encoder: Layer, x: Tensor) -> Tensor:
    """What the encoder takes as it stands: floats like its weights."""
    return like_weights(encoder, normalized(x) if x.dtype == torch.uint8 else x)
