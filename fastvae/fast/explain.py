"""fastvae.explain: the path of each block, the reason for it, and the cost of a pass, as text and as data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from fastvae_kernels.cpu import library, winograd
from fastvae_kernels.shared.runtime import Cost
from torch import Tensor

from fastvae.fast import cost_trace, fallback_reasons
from fastvae.fast.accelerate import accelerated, path_of, unwrapped, vae_of, why_not_reached
from fastvae.fast.fallback_reasons import Reason
from fastvae.fast.fast_path import FastPath
from fastvae.fast.forms import tables
from fastvae.fast.forms.form import FUSED, ON_CPU, Form
from fastvae.fast.forms.shapes import Convolution, convolutions_of, input_of
from fastvae.fast.inference_pass import InferencePass
from fastvae.fast.layer_checks import Layer
from fastvae.latents.autoencoder import ACCELERATED


@dataclass(frozen=True)
class BlockRow:
    """One block: its name in the model, the path it takes, the reason if it is not fused, and its cost."""

    name: str
    path: str
    """"fused", "differentiable" (fused ops with gradients), "cpu" (C kernels and torch's operators), or "module"."""
    reason: Reason | None
    cost: Cost
    """Cost of its calls; zero for a block that runs as a module, which is not traced."""


@dataclass(frozen=True)
class FormRow:
    """A 3x3 convolution of stride 1: its name in the model, the form that it takes, and why."""

    name: str
    form: Form
    why: str


@dataclass
class Explanation:
    """Rows of encoder and decoder in the order of the data, the kernel launches of each part, by op, and the form of
    each convolution.
    """

    rows: list[BlockRow]
    launches: dict[str, dict[str, int]] = field(default_factory=dict)
    accelerated: bool = True
    """False if the model is not, and the rows say what ``accelerate`` would do."""
    forms: list[FormRow] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, Reason]:
        """Reasons of the blocks that are not fused, by block name."""
        return {row.name: row.reason for row in self.rows if row.reason is not None}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = [] if self.accelerated else ["not accelerated; fastvae.accelerate would run it by these paths:"]
        for row in self.rows:
            cost = f"{row.cost.launches:4d} launches {row.cost.bytes / 1e6:9.1f} MB" if row.cost.launches else ""
            why = f"{row.reason.name}: {row.reason.value}" if row.reason else ""
            lines.append(f"{row.name:{width}}  {row.path:14}  {cost:28}  {why}".rstrip())
        width = max((len(row.name) for row in self.forms), default=0)
        if len({(row.form, row.why) for row in self.forms}) == 1:  # most often the direct form, for one reason
            lines.append(f"all {len(self.forms)} convolutions: {self.forms[0].form}: {self.forms[0].why}")
        else:
            lines += [f"{row.name:{width}}  {row.form:14}  {row.why}" for row in self.forms]
        return "\n".join(lines)


def explain(vae_or_pipe: Any, shape: tuple[int, int, int, int] | None = None) -> Explanation:
    """Return the path of each block of a VAE for images of ``shape``, without running it.

    Of a model that is not accelerated, return the paths that ``accelerate`` would give it, and leave it as it is.
    shape: (B, C, H, W) of the images, in pixels, by default one of 256 x 256. The decoder is traced for the latents of
    such images. As in a call, grad mode and the parameters decide if a gradient is needed.
    Raises ValueError if the shape is not of this form, and TypeError if there is no VAE, or one that ``accelerate``
    refuses.
    """
    vae = vae_of(vae_or_pipe)
    if ACCELERATED not in vars(vae):
        with accelerated(vae):
            return replace(explain(vae, shape), accelerated=False)
    path = path_of(vae)
    rows: list[BlockRow] = []
    launches: dict[str, dict[str, int]] = {}
    forms: list[FormRow] = []
    for name in ("encoder", "decoder"):
        part = unwrapped(getattr(vae, name, None))
        if part is not None:
            part_rows, part_launches = _explain_part(vae, name, part, path, shape)
            rows += part_rows
            launches[name] = dict(part_launches)
            forms += _forms(vae, part, path, shape)
    return Explanation(rows, launches, forms=forms)


def _forms(vae: Layer, part: Layer, path: FastPath, shape: Any) -> list[FormRow]:
    """Return the form of each convolution of a part that has forms: of calls without a gradient, fused or on a CPU."""
    if why_not_reached(part, path) is not None:
        return []
    x = _input(part, shape)
    if path.why_not(part, x) not in (None, Reason.CPU) or fallback_reasons.needs_gradient(part, x):
        return []
    names = {module: name for name, module in vae.named_modules()}
    return [FormRow(names[layer.conv], *_form(path, layer, x.device)) for layer in convolutions_of(part, x)]


def _form(path: FastPath, layer: Convolution, device: torch.device) -> tuple[Form, str]:
    """Return the form that a convolution takes in a call without a gradient, and why."""
    if path.forms is None and not path.takes_forms(device):
        return Form.DIRECT, "weights that may change take no other form: freeze=True"
    forms = path.forms_on(device)
    form = forms.choose(layer.key, layer.pixels)
    on_cpu = device.type not in fallback_reasons.KERNEL_DEVICES
    if form not in (Form.DIRECT, *(ON_CPU if on_cpu else FUSED)[layer.key.kind]):
        return Form.DIRECT, f"this path has no {form} for it"
    if form is not Form.DIRECT and on_cpu and not winograd.takes(layer.conv.weight):
        return Form.DIRECT, library.why_not() or "no C kernel takes its channels and dtype"
    why = forms.why(layer.key, layer.pixels) or tables.why_none(device)
    return form, f"{why}; the C kernel {library.build_name()}" if form is not Form.DIRECT and on_cpu else why


def _explain_part(vae: Any, name: str, part: Layer, path: Any, shape: Any) -> tuple[list[BlockRow], Counter[str]]:
    reason = why_not_reached(part, path)
    if reason is not None:
        return [BlockRow(name, "module", reason, cost_trace.NOTHING)], Counter()
    x = _input(part, shape)
    reason = path.why_not(part, x)
    if reason is not None:
        return [BlockRow(name, path.way(part, x, reason), reason, cost_trace.NOTHING)], Counter()
    run = path.pass_for(part, x)
    kind = path.way(part, x, reason)
    if isinstance(run, InferencePass):
        for module in part.modules():  # decide on real weights: fake ones have no values
            if hasattr(module, "to_out") and fallback_reasons.why_not_attention(module, x) is None:
                path.packed.uses_shared_attention(module)
        run.packed = path.packed.for_trace()
    with cost_trace.fake_mode():
        fake = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        # The first call packs frozen weights: report the second, the steady state.
        if isinstance(run, InferencePass) and run.packed.frozen:
            cost_trace.count(part, fake, run)
        counter, noted = cost_trace.count(part, fake, run)
    launches: Counter[str] = Counter()
    for _, called, cost in counter.calls:
        launches[called] += cost.launches
    rows = [_row(vae, module, why, kind, counter.calls) for module, why in noted.items()]
    return rows, launches


def _row(vae: Layer, module: Layer, reason: Reason | None, fused: str, calls: list) -> BlockRow:
    name = next(name for name, candidate in vae.named_modules() if candidate is module)
    own = sum((cost for inside, _, cost in calls if inside is module), cost_trace.NOTHING)
    return BlockRow(name, "module" if reason else fused, reason, own)


def _input(part: Layer, shape: Any) -> Tensor:
    if shape is None:
        side = 32 * 2 ** (len(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks) - 1)
        return input_of(part, 1, side, side)
    if not (isinstance(shape, (tuple, list)) and len(shape) == 4 and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError(f"shape must be (B, C, H, W) of the images, got {shape!r}")
    batch, _, height, width = shape
    return input_of(part, batch, height, width)
