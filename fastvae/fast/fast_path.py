"""State of an accelerated VAE: settings, packed copies of frozen weights, and counts."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from fastvae_kernels.cpu.library import build_name
from torch import Tensor

from fastvae.fast import fallback_reasons, network_walk
from fastvae.fast.capture import compiled_passes
from fastvae.fast.capture.compiled_passes import Compiled, WideGroupNorm
from fastvae.fast.capture.cuda_graphs import Graphs
from fastvae.fast.counters import DeviceCounters
from fastvae.fast.cpu.cpu_pass import CpuPass
from fastvae.fast.cpu.group_norm import ContiguousGroupNorm
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.forms.form import DIRECT_ONLY, Forms
from fastvae.fast.forms.tables import forms_of
from fastvae.fast.fp32_copy import Fp32Copy
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.layer_checks import Layer
from fastvae.fast.packed_weights import PackedWeights, channels_last, images_of, is_channels_last
from fastvae.fast.survey import Survey
from fastvae.fast.tiled.exact_tiling import ExactTiling
from fastvae.fast.training_pass import TrainingPass
from fastvae.latents.autoencoder import ACCELERATED, like_weights
from fastvae.latents.pixels import normalized


class Factors(NamedTuple):
    """Powers of two by which the fp16 activations of an encoder or decoder are multiplied."""

    stream: float = 2.0**-6
    """The residual stream: up to 65,504 * 2^6 = 4.2 million fits, and SDXL's decoder reaches some 10^5."""
    inner: float = 2.0**-6
    """Activations between conv1 and norm2. The cost of either factor: values below 2^-14 * 2^6 = 0.004 have an absolute
    error of up to 2^-25 * 2^6 = 1.9e-6, where plain fp16 has a relative one (docs/numerics.md)."""


UNSCALED = Factors(1.0, 1.0)


class FastPath:
    """State of one ``accelerate`` call, shared by a VAE, its encoder and its decoder."""

    def __init__(
        self,
        precision: str = "fast",
        *,
        deterministic: bool = False,
        graphs: bool = False,
        freeze: bool = False,
        compile: bool = False,
    ):
        self.precision = precision
        self.deterministic = deterministic
        self.graphs = Graphs() if graphs else None
        self.compiled = Compiled() if compile else None
        self.factors = {"encoder": Factors(), "decoder": Factors()}
        self.packed = PackedWeights(frozen=freeze)
        self.forms: Forms | None = None  # None: those of the device's tables
        self.surveys: dict[str, Survey] = {}
        self.fp32_copies: dict[str, Fp32Copy] = {}
        self.tiling: ExactTiling | None = None
        self.counts: dict[str, Any] = {"rows": 0, "rows_again_in_fp32": 0}
        self.counters = DeviceCounters()

    def __reduce__(self):
        # A pickled model is stock: pickle looks bound methods up by name, and finds the class's own forward.
        return type(None), ()

    def __deepcopy__(self, memo: dict) -> FastPath:
        clone = FastPath.__new__(FastPath)
        memo[id(self)] = clone
        # Packed copies and surveys are not copied: they hold modules of the whole VAE, and the copy may be of one part.
        empty = {id(self.packed): PackedWeights(self.packed.frozen), id(self.surveys): {}, id(self.fp32_copies): {}}
        vars(clone).update(copy.deepcopy(vars(self), memo | empty))
        return clone

    def forget(self) -> None:
        """Drop everything that depends on the weights."""
        if self.graphs is not None:
            self.graphs.clear()  # first: graphs read the packed copies
        if self.compiled is not None:
            self.compiled.clear()
        self.packed.clear()
        self.fp32_copies.clear()

    def why_not(self, part: Layer, x: Tensor, survey: Survey | None = None) -> Reason | None:
        """Return why this call runs the part's own forward, or None; ``survey`` may be the part's own."""
        if self.precision == "exact":
            return Reason.EXACT
        decided = fallback_reasons.why_not_part(part) if survey is None else survey.why_not
        return decided or fallback_reasons.why_not_input(part, x)

    def survey(self, part: Layer) -> Survey | None:
        """Return the decisions on an encoder or decoder, made again if anything that decides has changed.

        None where none are kept: in a trace, and with precision="exact".
        """
        if torch.compiler.is_compiling() or self.precision == "exact":
            return None
        survey = self.surveys.get(part_name(part))
        if survey is None or not survey.holds(part):
            survey = self.surveys[part_name(part)] = Survey(part)
        return survey

    def way(self, part: Layer, x: Tensor, reason: Reason | None) -> str:
        """Return the path of a call with this reason: "fused", "differentiable", "cpu" (CpuPass) or "module"."""
        if reason is Reason.CPU and x.device.type == "cpu" and not fallback_reasons.needs_gradient(part, x):
            return "cpu"
        if reason is not None:
            return "module"
        return "differentiable" if fallback_reasons.needs_gradient(part, x) else "fused"

    def pass_for(self, part: Layer, x: Tensor, quant_conv: Layer | None = None) -> network_walk.Pass:
        """Return the pass for this call: TrainingPass if a gradient is needed, else InferencePass."""
        if fallback_reasons.needs_gradient(part, x):
            return TrainingPass()
        return self._inference_pass(part, x, quant_conv)

    def _inference_pass(self, part: Layer, x: Tensor, quant_conv: Layer | None) -> InferencePass:
        half = part.conv_in.weight.dtype == torch.float16
        factors = self.factors[part_name(part)] if half else UNSCALED
        return InferencePass(
            self.packed,
            deterministic=self.deterministic,
            stream_factor=factors.stream,
            inner_factor=factors.inner,
            quant_conv=quant_conv,
            forms=self.forms_on(x.device),
        )

    def pass_without_gradient(self, part: Layer, x: Tensor) -> InferencePass | CpuPass:
        """Return the pass of a call that needs no gradient: InferencePass where fused kernels run, else CpuPass."""
        if x.device.type in fallback_reasons.KERNEL_DEVICES:
            return self._inference_pass(part, x, None)
        return self.cpu_pass(x.device)

    def cpu_pass(self, device: torch.device) -> CpuPass:
        """Return the pass of a device without fused kernels."""
        return CpuPass(self.packed, self.forms_on(device))

    def forms_on(self, device: torch.device) -> Forms:
        """Return the forms of convolutions on a device: its tables', or the direct one."""
        if self.forms is not None:
            return self.forms
        return forms_of(device) if self.takes_forms(device) else DIRECT_ONLY

    def takes_forms(self, device: torch.device) -> bool:
        """Return False for weights that may change, on a GPU: one call saves less than a transformed weight costs."""
        return self.packed.frozen or device.type not in fallback_reasons.KERNEL_DEVICES

    def run(self, part: Layer, x: Tensor) -> Tensor:
        """Return the part's output for x, on the fast path if possible, and count its rows without waiting."""
        if self.tiling is not None:
            return self._run_tiled(self.tiling, part, x)
        if self.compiled is not None and compiled_passes.is_plain_call():
            return self.compiled.call(self._run, part, x)
        return self._run(part, x)

    def _run_tiled(self, tiling: ExactTiling, part: Layer, x: Tensor) -> Tensor:
        """Return the part's output in bands of rows. Raises ValueError for a part that has no way to run so."""
        reason = self.why_not(part, x, self.survey(part))
        if reason not in (None, Reason.CPU) or fallback_reasons.needs_gradient(part, x):
            why = Reason.GRADIENT if reason in (None, Reason.CPU) else reason
            raise ValueError(f"exact tiling cannot run the {part_name(part)} in bands: {why}; call disable_tiling")
        return tiling.run(part, part_name(part), x, self.packed, self.forms_on(x.device))

    def _run(self, part: Layer, x: Tensor) -> Tensor:
        survey = self.survey(part)
        reason = self.why_not(part, x, survey)
        if not x.is_floating_point():
            return type(part).forward(part, x)  # torch raises its own error; only encode_latents takes bytes
        if reason is None:
            return self._run_fused(part, x, survey=survey)
        if self.graphs is not None and not torch.compiler.is_compiling():
            self.graphs.plain[reason] += 1
        if reason is Reason.CPU and x.device.type == "cpu":
            y = self._run_on_cpu(part, x, survey)
            return y if is_channels_last(x) else y.contiguous()
        return type(part).forward(part, x)

    def _run_on_cpu(self, part: Layer, x: Tensor, survey: Survey | None) -> Tensor:
        """Return the part's output from CpuPass; from its own forward in a trace and where a gradient is needed."""
        if torch.compiler.is_compiling():  # a trace needs torch's own ops
            with WideGroupNorm():
                return type(part).forward(part, channels_last(x))
        if not compiled_passes.is_plain_call():
            return type(part).forward(part, x)
        if fallback_reasons.needs_gradient(part, x):
            with ContiguousGroupNorm():
                return type(part).forward(part, channels_last(x))
        run = self.cpu_pass(x.device)
        run.sure = survey is not None and survey.fused
        rows = images_of(x) if self.deterministic else (x,)
        done = [network_walk.run_part(part, row, run) for row in rows]
        return torch.cat(done) if len(done) > 1 else done[0]

    def _run_fused(
        self, part: Layer, x: Tensor, quant_conv: Layer | None = None, survey: Survey | None = None
    ) -> Tensor:
        """Return the part's output from the fused kernels, or from a graph of them, and count its rows."""
        run = self.pass_for(part, x, quant_conv)
        run.sure = survey is not None and survey.fused

        def work(x: Tensor) -> Tensor:
            y = network_walk.run_part(part, x, run)
            return y if is_channels_last(x) else y.contiguous()

        if survey is None:  # a trace
            y = work(x)
            # torch.compile would guard a Python number by its value and compile again at each call.
            self.counters.add(y, rows=y.shape[0])
            return y
        self.counts["rows"] += x.shape[0]
        if self.graphs is not None:
            return self.graphs.run(survey, x, run, work, self.counters.add)
        y = work(x)
        self.counters.add(y)
        return y

    def moments(self, vae: Any, x: Tensor, *, again_in_fp32: bool = False) -> Tensor:
        """Return mean and log-variance [B, 2L, h, w] of pixels x [B, C, H, W], uint8 or floats in [-1, 1].

        quant_conv is folded into conv_out unless either has a hook, an adapter or a trainable weight.
        again_in_fp32: encode rows of half precision that are not finite again in fp32; waits for the result.
        """
        encoder, quant_conv = vae.encoder, getattr(vae, "quant_conv", None)
        if encoder is None:
            return vae.encode(x).latent_dist.parameters  # raises that there is no encoder
        untiled = not (self.tiling or getattr(vae, "use_tiling", False) or getattr(vae, "use_slicing", False))
        survey = self.survey(encoder)
        fused = untiled and vars(encoder).get(ACCELERATED) is self and self.why_not(encoder, x, survey) is None
        if not fused or fallback_reasons.needs_gradient(encoder, x) or fallback_reasons.why_not_quant_conv(vae):
            moments = self._image_by_image(lambda x: vae.encode(x).latent_dist.parameters, _as_floats(encoder, x))
        elif self.compiled is not None and compiled_passes.is_plain_call():
            moments = self.compiled.call(self._run_fused, encoder, x, quant_conv)
        else:
            moments = self._run_fused(encoder, x, quant_conv, survey)
        return self.redo_overflow(vae, x, moments) if again_in_fp32 else moments

    def redo_overflow(self, vae: Any, x: Tensor, moments: Tensor) -> Tensor:
        """Return ``moments`` of pixels ``x`` with the rows of half precision that are not finite encoded again in fp32.

        Other rows keep their bits. Waits for the result.
        """

        def again(wide: Any, row: slice) -> Tensor:
            return wide.encode(_as_floats(wide.encoder, x[row])).latent_dist.parameters

        return self._redo_overflow(moments, vae, "decoder", again)

    def images(self, vae: Any, z: Tensor) -> Tensor:
        """Return images [B, C, H, W] of raw latents z [B, L, h, w].

        Rows of half precision that are not finite are decoded again in fp32. Waits for the result.
        """
        y = self._image_by_image(lambda z: vae.decode(z).sample, z)
        return self._redo_overflow(y, vae, "encoder", lambda wide, row: wide.decode(z[row].float()).sample)

    def _image_by_image(self, call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Return ``call(x)`` for x [B, ...], image by image with ``deterministic``.

        quant_conv and post_quant_conv, which the model runs, depend on the batch as well (in fp32 on a CPU from 24
        images of 64x64 on).
        """
        if not self.deterministic or not x.shape[0]:
            return call(x)
        return torch.cat([call(row) for row in images_of(x)])

    def _redo_overflow(self, y: Tensor, vae: Any, unused: str, again: Callable[[Any, slice], Tensor]) -> Tensor:
        """Return y [B, ...] with the rows that are not finite replaced by ``again(fp32 copy of vae, row)``."""
        bad = (~y.isfinite().flatten(1).all(1)).nonzero().flatten()
        if y.dtype == torch.float32 or not len(bad):
            return y
        self.counts["rows_again_in_fp32"] += len(bad)
        wide = self._fp32_copy(vae, unused)
        # One row at a time: a batch that fills the GPU in half precision does not fit in fp32.
        exact = torch.cat([again(wide, slice(row, row + 1)) for row in bad.tolist()])
        return y.index_copy(0, bad, exact.to(y.dtype))

    def _fp32_copy(self, vae: Any, unused: str) -> Any:
        held = self.fp32_copies.get(unused)
        if held is None or not held.holds(vae):
            self.fp32_copies.pop(unused, None)  # its memory first
            held = self.fp32_copies[unused] = Fp32Copy(vae, unused, self)
        return held.updated()

    def report(self) -> dict[str, int | str]:
        """Return the counts, the bytes of packed copies, the state of the C kernels, and log2 of the fp16 factors."""
        factors = {
            f"{part}_{name}_log2": int(math.log2(factor))
            for part, pair in self.factors.items()
            for name, factor in pair._asdict().items()
        }
        return {
            **self.counts,
            "rows": self.counts["rows"] + self.counters.rows(),
            "non_finite_rows": self.counters.non_finite_rows(),
            "packed_bytes": self.packed.bytes(),
            "fp32_copy_bytes": sum(held.bytes() for held in list(self.fp32_copies.values())),
            "cpu_kernels": build_name(),
            **factors,
            **({} if self.graphs is None else self.graphs.report()),
        }


def part_name(part: Layer) -> str:
    """Return "encoder" or "decoder"."""
    return "encoder" if hasattr(part, "down_blocks") else "decoder"


def _as_floats(encoder: Layer, x: Tensor) -> Tensor:
    """Return x as floats of the encoder's dtype and device; bytes become [-1, 1]."""
    return like_weights(encoder, normalized(x) if x.dtype == torch.uint8 else x)
