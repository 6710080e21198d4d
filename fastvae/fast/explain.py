"""fastvae.explain: which path each block takes and why, and what a pass costs, as text and as data."""

from __future__ import annotations

from collections import Counter as Tally
from dataclasses import dataclass, field
from typing import Any

import torch
from fastvae_kernels.shared.runtime import Cost
from torch import Tensor

from fastvae.fast import cost_trace as trace
from fastvae.fast import fallback_reasons as reasons
from fastvae.fast.accelerate import out_of_reach, path_of, unwrapped, vae_of
from fastvae.fast.inference_pass import Inference
from fastvae.fast.layer_checks import Layer, Reason


@dataclass(frozen=True)
class Row:
    """One block: its name in the model, the path it takes, the reason where it is not fused, and what it costs."""

    name: str
    path: str
    """"fused", "differentiable" (fused ops with gradients), or "module" (as it stands)."""
    reason: Reason | None
    cost: Cost
    """What its calls cost; of a block that runs as a module only what torch calls in it are seen."""


@dataclass
class Explanation:
    """Rows for encoder and decoder in the order of the data, and the kernel launches of each, by op."""

    rows: list[Row]
    launches: dict[str, dict[str, int]] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, Reason]:
        """The blocks that are not fused, by name."""
        return {row.name: row.reason for row in self.rows if row.reason is not None}

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        lines = []
        for row in self.rows:
            cost = f"{row.cost.launches:4d} launches {row.cost.bytes / 1e6:9.1f} MB" if row.cost.launches else ""
            why = f"{row.reason.name}: {row.reason.value}" if row.reason else ""
            lines.append(f"{row.name:{width}}  {row.path:14}  {cost:28}  {why}".rstrip())
        return "\n".join(lines)


def explain(vae_or_pipe: Any, shape: tuple[int, int, int, int] | None = None) -> Explanation:
    """Which path each block of an accelerated VAE takes for images of ``shape``, without running it.

    shape: (B, C, H, W) of the images, by default one of 256 x 256. The decoder is asked for the latents of that shape,
    of the model's dtype. Whether a gradient is needed is taken from grad mode and the parameters, as in a call.
    Raises ValueError for a model that is not accelerated and for a shape of another rank.
    """
    vae = vae_of(vae_or_pipe)
    path = path_of(vae)
    rows: list[Row] = []
    launches: dict[str, dict[str, int]] = {}
    for name in ("encoder", "decoder"):
        part = unwrapped(getattr(vae, name, None))
        if part is not None:
            part_rows, tally = _explain_part(vae, name, part, path, shape)
            rows += part_rows
            launches[name] = dict(tally)
    return Explanation(rows, launches)


def _explain_part(vae: Any, name: str, part: Layer, path: Any, shape: Any) -> tuple[list[Row], Tally[str]]:
    reason = out_of_reach(part, path)
    if reason is not None:
        return [Row(name, "module", reason, trace.NOTHING)], Tally()
    weight = next(part.parameters())
    x = _input(part, shape, weight)
    reason = path.why_not(part, x)
    if reason is not None:
        return [Row(name, "module", reason, trace.NOTHING)], Tally()
    run = path.pass_for(part, x)
    kind = "fused" if isinstance(run, Inference) else "differentiable"
    if isinstance(run, Inference):
        for module in part.modules():  # decided on real weights: under the fake mode there are no values
            if hasattr(module, "to_out") and reasons.why_not_attention(module, weight) is None:
                path.derived.takes_the_shared_form(module)
        run.derived = path.derived.for_trace()
    with trace.fake_mode():
        fake = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if isinstance(run, Inference) and run.derived.frozen:  # the first call packs, and those after it are told
            trace.count(part, fake, run)
        counter, noted = trace.count(part, fake, run)
    tally: Tally[str] = Tally()
    for _, called, cost in counter.calls:
        tally[called] += cost.launches
    rows = [_row(vae, module, why, kind, counter.calls) for module, why in noted.items()]
    return rows, tally


def _row(vae: Layer, module: Layer, reason: Reason | None, fused: str, calls: list) -> Row:
    name = next(name for name, candidate in vae.named_modules() if candidate is module)
    own = sum((cost for inside, _, cost in calls if inside is module), trace.NOTHING)
    return Row(name, "module" if reason else fused, reason, own)


def _input(part: Layer, shape: Any, weight: Tensor) -> Tensor:
    factor = 2 ** (len(part.down_blocks if hasattr(part, "down_blocks") else part.up_blocks) - 1)
    channels = getattr(part.conv_in, "in_channels", 0)  # an adapter has none, and its part falls back
    if shape is None:
        shape = (1, channels, 32 * factor, 32 * factor)
    if not (isinstance(shape, (tuple, list)) and len(shape) == 4 and all(isinstance(n, int) and n >= 0 for n in shape)):
        raise ValueError(f"shape must be (B, C, H, W) of the images, got {shape!r}")
    batch, _, height, width = shape
    if hasattr(part, "up_blocks"):
        height, width = height // factor, width // factor
    # A tensor of the shape without its memory: expand makes one value of it.
    return torch.empty(1, dtype=weight.dtype, device=weight.device).expand(batch, channels, height, width)
